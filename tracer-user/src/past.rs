//! Processes that have ended: what is kept of them, however many there are.
//!
//! Of the latest everything is kept; what earlier ones did is added up by program.

use std::{
    collections::{HashMap, VecDeque},
    path::PathBuf,
    rc::Rc,
};

use crate::{
    account::{Account, SiteId},
    discover::{labels::Container, process::Process},
    stacks::Stack,
};

/// Processes that are kept one by one.
const MOST_PROCESSES: usize = 1024;
/// Sites that they have in all.
const MOST_SITES: usize = 1 << 16;
/// Sites of a program that many processes ran.
const MOST_SITES_OF_PROGRAM: usize = 1 << 14;
/// Programs that are told apart. On a host where containers come and go there are ever new ones.
const MOST_PROGRAMS: usize = 1024;
/// The name that those beyond have in all.
const OTHERS: &str = "(others)";

/// What ended processes did.
#[derive(Debug, Default)]
pub struct Past {
    /// The latest last, each with a number that says where it belongs among those that run.
    latest: VecDeque<(u64, Account)>,
    /// Sites of those.
    sites: usize,
    earlier: HashMap<Program, Sum>,
    /// Stacks of all of them: processes that run the same program share most.
    stacks: HashMap<(SiteId, bool), Rc<Stack>>,
    /// How many of those there were when unused ones were looked for.
    stacks_before: usize,
}

/// What processes are added up by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Program {
    exe: PathBuf,
    /// Where the program is not known.
    comm: Option<String>,
    container: Option<Container>,
}

/// Several processes as one.
#[derive(Debug)]
pub struct Sum {
    /// What they did in all.
    pub account: Account,
    /// How many they were.
    pub instances: usize,
}

impl Past {
    /// Takes in a process that has ended.
    pub fn add(&mut self, number: u64, mut account: Account) {
        for (id, site) in &mut account.sites {
            if let Some(stack) = &mut site.stack {
                let key = (*id, stack.is_sampled());
                *stack = Rc::clone(self.stacks.entry(key).or_insert_with(|| Rc::clone(stack)));
            }
        }
        if self.stacks.len() > 2 * self.stacks_before.max(MOST_SITES) {
            self.stacks.retain(|_, stack| Rc::strong_count(stack) > 1);
            self.stacks_before = self.stacks.len();
        }
        self.sites += account.sites.len();
        self.latest.push_back((number, account));
        while self.latest.len() > MOST_PROCESSES
            || (self.sites > MOST_SITES && self.latest.len() > 1)
        {
            let Some((_, account)) = self.latest.pop_front() else {
                return;
            };
            self.sites -= account.sites.len();
            self.add_up(account);
        }
    }

    fn add_up(&mut self, mut account: Account) {
        let process = &account.process;
        let program = Program {
            exe: process.exe.clone(),
            comm: process
                .exe
                .as_os_str()
                .is_empty()
                .then(|| process.comm.clone()),
            container: process.labels.container.clone(),
        };
        let mut program = program;
        if !self.earlier.contains_key(&program) && self.earlier.len() >= MOST_PROGRAMS {
            account.process = Process::gone(0, OTHERS);
            program = Program {
                exe: PathBuf::new(),
                comm: Some(OTHERS.to_owned()),
                container: None,
            };
        }
        match self.earlier.get_mut(&program) {
            Some(sum) => {
                sum.account.add(account, MOST_SITES_OF_PROGRAM);
                sum.instances += 1;
            }
            None => {
                let sum = Sum {
                    account,
                    instances: 1,
                };
                self.earlier.insert(program, sum);
            }
        }
    }

    /// Forgets what was counted since the last mark: there is a new one.
    pub fn forget_marks(&mut self) {
        let latest = self.latest.iter_mut().map(|(_, account)| account);
        let earlier = self.earlier.values_mut().map(|sum| &mut sum.account);
        for site in latest
            .chain(earlier)
            .flat_map(|account| account.sites.values_mut())
        {
            site.since_mark = None;
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.latest.is_empty()
    }

    /// The latest, with their numbers.
    pub fn latest(&self) -> impl Iterator<Item = &(u64, Account)> {
        self.latest.iter()
    }

    /// Those before, by program.
    pub fn earlier(&self) -> impl Iterator<Item = &Sum> {
        self.earlier.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::SiteAccount;

    fn account(exe: &str, sites: u64) -> Account {
        let mut process = Process::gone(7, "comm");
        process.exe = exe.into();
        let site = |number: u64| {
            let site = SiteAccount {
                allocs: 1,
                alloc_bytes: number,
                ..SiteAccount::default()
            };
            (SiteId::new(&[], Some(&number.to_string())), site)
        };
        Account {
            sites: (0..sites).map(site).collect(),
            peak_live_bytes: 1,
            ..Account::empty(process)
        }
    }

    fn allocs(account: &Account) -> u64 {
        account.sites.values().map(|site| site.allocs).sum()
    }

    #[test]
    fn of_many_processes_the_latest_are_kept_and_the_others_added_up() {
        const MANY: u64 = 5000;
        let mut past = Past::default();
        for number in 0..MANY {
            let exe = if number % 2 == 0 { "/even" } else { "/odd" };
            past.add(number, account(exe, 3));
        }
        let numbers: Vec<u64> = past.latest().map(|(number, _)| *number).collect();
        let kept = MOST_PROCESSES as u64;
        assert_eq!(numbers, Vec::from_iter(MANY - kept..MANY));
        let sums: Vec<_> = past.earlier().collect();
        assert_eq!(sums.len(), 2);
        for sum in sums {
            assert_eq!(sum.instances as u64, (MANY - kept) / 2);
            assert_eq!(sum.account.sites.len(), 3);
            assert_eq!(allocs(&sum.account), 3 * (MANY - kept) / 2);
        }
    }

    #[test]
    fn sites_are_bounded_and_nothing_that_was_done_is_lost() {
        let mut past = Past::default();
        let sites = MOST_SITES_OF_PROGRAM as u64 + 5000;
        for number in 0..20 {
            past.add(number, account("/program", sites));
        }
        let latest: u64 = past.latest().map(|(_, account)| allocs(account)).sum();
        let earlier: u64 = past.earlier().map(|sum| allocs(&sum.account)).sum();
        assert_eq!(latest + earlier, 20 * sites);
        assert!(past.sites <= MOST_SITES);
        let sums: Vec<_> = past.earlier().collect();
        assert_eq!(sums.len(), 1);
        // The first had more than there is room for, and kept them.
        assert!(sums[0].account.sites.len() as u64 <= sites + 1);
    }

    #[test]
    fn programs_of_the_same_path_in_other_containers_are_others() {
        let mut past = Past::default();
        for number in 0..2 * MOST_PROCESSES as u64 {
            let mut account = account("/program", 1);
            account.process.labels.container = Some(Container {
                id: (number % 2).to_string(),
                runtime: None,
                name: None,
            });
            past.add(number, account);
        }
        assert_eq!(past.earlier().count(), 2);
    }
    #[test]
    fn ever_new_programs_are_one_in_the_end() {
        const MANY: u64 = 5000;
        let mut past = Past::default();
        for number in 0..MANY {
            past.add(number, account(&format!("/{number}"), 1));
        }
        assert_eq!(past.earlier().count(), MOST_PROGRAMS + 1);
        let all: usize = past.earlier().map(|sum| sum.instances).sum();
        assert_eq!(all + MOST_PROCESSES, MANY as usize);
        let others = past
            .earlier()
            .find(|sum| sum.account.process.comm == OTHERS);
        assert_eq!(others.map(|sum| sum.account.sites.len()), Some(1));
    }
}

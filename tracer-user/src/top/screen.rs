//! The table on a terminal, as a whole screen that a process can be selected on.

use std::{io, time::Duration};

use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use log::LevelFilter;
use ratatui::{
    DefaultTerminal, Frame,
    layout::{Constraint, Layout, Rect},
    style::{Modifier, Style},
    text::Line,
    widgets::{Block, Borders, Cell, Paragraph, Row as TableRow, Table, TableState},
};

use super::{
    plain::{self, COLUMNS, WIDTHS},
    report::{Row, TopReport},
};
use crate::report::stack::{View, name, place};

/// Lines below the table, for the process that is selected.
const DETAIL_LINES: u16 = 11;
/// The columns by how much they matter: where there is no room for all, the last ones are left out.
const BY_IMPORTANCE: [usize; 11] = [0, 1, 2, 4, 3, 10, 9, 5, 8, 6, 7];
const KEYS: &str = " ↑↓ select   Enter attach to it   q quit";

/// The screen, as long as it lives; then the terminal is as it was.
#[derive(Debug)]
pub struct Screen {
    terminal: DefaultTerminal,
    view: Selection,
    /// What is on it.
    report: Option<TopReport>,
    /// What is said instead of the keys, until the next one.
    message: Option<String>,
    log_level: LevelFilter,
}

/// What the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// To see the screen anew.
    Redraw,
    /// To attach to this process.
    Attach(u32),
    /// To leave.
    Quit,
}

/// Which process is selected; it stays so wherever it moves in the table.
#[derive(Debug, Default)]
struct Selection {
    table: TableState,
    pid: Option<u32>,
}

impl Screen {
    /// Takes the terminal over.
    pub fn open() -> io::Result<Self> {
        let terminal = ratatui::try_init()?;
        let log_level = log::max_level();
        // It would be written across the screen.
        log::set_max_level(LevelFilter::Off);
        Ok(Self {
            terminal,
            view: Selection::default(),
            report: None,
            message: None,
            log_level,
        })
    }

    /// Processes that there is room for.
    #[must_use]
    pub fn rows(&self) -> usize {
        let height = self.terminal.size().map_or(24, |size| size.height);
        usize::from(height.saturating_sub(DETAIL_LINES + 3)).max(1)
    }

    /// The process that is selected.
    #[must_use]
    pub const fn selected(&self) -> Option<u32> {
        self.view.pid
    }

    /// Shows a report.
    pub fn draw(&mut self, report: TopReport) -> io::Result<()> {
        let Self {
            terminal,
            view,
            message,
            ..
        } = self;
        view.follow(&report.processes);
        let last_line = message
            .as_ref()
            .map_or(KEYS.to_owned(), |text| format!(" {text}"));
        terminal.draw(|frame| draw(&report, view, &last_line, frame))?;
        self.report = Some(report);
        Ok(())
    }

    /// Says something when it is drawn next, until a key is pressed.
    pub fn say(&mut self, message: String) {
        self.message = Some(message);
    }

    /// Takes in the keys that were pressed. Gives what is wanted, none if that is nothing.
    pub fn keys(&mut self) -> io::Result<Option<Wish>> {
        let rows = self.report.as_ref().map_or(&[][..], |of| &of.processes);
        let mut wish = None;
        while event::poll(Duration::ZERO)? {
            match event::read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release => {
                    self.message = None;
                    match self.view.key(key, rows) {
                        Some(Wish::Redraw) => wish = Some(Wish::Redraw),
                        Some(last) => return Ok(Some(last)),
                        None => {}
                    }
                }
                Event::Resize(..) => wish = Some(Wish::Redraw),
                _ => {}
            }
        }
        Ok(wish)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
        log::set_max_level(self.log_level);
    }
}

impl Selection {
    /// Finds the process again that is selected.
    fn follow(&mut self, rows: &[Row]) {
        let at = rows.iter().position(|row| Some(row.pid) == self.pid);
        self.table.select(at);
        if at.is_none() {
            self.pid = None;
        }
    }

    fn select(&mut self, rows: &[Row], step: isize) {
        let last = rows.len().saturating_sub(1);
        // The first is shown where none is selected.
        let now = self.table.selected().unwrap_or(0);
        let next = now.saturating_add_signed(step).min(last);
        self.table.select(Some(next));
        self.pid = rows.get(next).map(|row| row.pid);
    }

    /// The process whose stacks are shown: the first if none was selected.
    fn shown<'rows>(&self, rows: &'rows [Row]) -> Option<&'rows Row> {
        rows.get(self.table.selected().unwrap_or(0))
    }

    fn key(&mut self, key: KeyEvent, rows: &[Row]) -> Option<Wish> {
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                return Some(Wish::Quit);
            }
            _ if key.modifiers.contains(KeyModifiers::CONTROL) => return None,
            KeyCode::Char('q') | KeyCode::Esc => return Some(Wish::Quit),
            KeyCode::Enter | KeyCode::Char('a') => {
                return self.shown(rows).map(|row| Wish::Attach(row.pid));
            }
            KeyCode::Down | KeyCode::Char('j') => self.select(rows, 1),
            KeyCode::Up | KeyCode::Char('k') => self.select(rows, -1),
            KeyCode::PageDown => self.select(rows, 10),
            KeyCode::PageUp => self.select(rows, -10),
            KeyCode::Home => self.select(rows, isize::MIN),
            KeyCode::End => self.select(rows, isize::MAX),
            _ => return None,
        }
        Some(Wish::Redraw)
    }
}

fn draw(report: &TopReport, selection: &mut Selection, last_line: &str, frame: &mut Frame<'_>) {
    let [heading, table, detail, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Min(2),
        Constraint::Length(DETAIL_LINES),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let title = format!(" unfreed top: {}", plain::heading(report));
    frame.render_widget(Line::styled(title, bold()), heading);
    draw_table(report, selection, frame, table);
    if let Some(row) = selection.shown(&report.processes) {
        draw_detail(row, report, frame, detail);
    }
    frame.render_widget(
        Line::styled(last_line, Style::new().add_modifier(Modifier::DIM)),
        keys,
    );
}

fn bold() -> Style {
    Style::new().add_modifier(Modifier::BOLD)
}

fn draw_table(report: &TopReport, selection: &mut Selection, frame: &mut Frame<'_>, area: Rect) {
    let columns = columns_for(area.width.into());
    let aligned = |cells: [String; 11]| {
        TableRow::new(columns.iter().map(|column| {
            let line = Line::from(cells[*column].clone());
            Cell::from(if *column == 1 {
                line.left_aligned()
            } else {
                line.right_aligned()
            })
        }))
    };
    let rows = report.processes.iter().map(|row| {
        let style = if row.grows() { bold() } else { Style::new() };
        aligned(plain::cells(row)).style(style)
    });
    let widths = columns
        .iter()
        .map(|column| Constraint::Length(WIDTHS[*column] as u16));
    let table = Table::new(rows, widths)
        .column_spacing(1)
        .header(aligned(COLUMNS.map(str::to_owned)).style(Modifier::UNDERLINED))
        .row_highlight_style(Modifier::REVERSED);
    frame.render_stateful_widget(table, area, &mut selection.table);
}

/// Which columns there is room for.
fn columns_for(width: usize) -> Vec<usize> {
    let mut left = width + 1;
    let mut columns: Vec<usize> = BY_IMPORTANCE
        .into_iter()
        .take_while(|column| {
            let fits = left > WIDTHS[*column];
            left = left.saturating_sub(WIDTHS[*column] + 1);
            fits
        })
        .collect();
    columns.sort_unstable();
    columns
}

/// What else is known of a process: the stack that most of it came in by, and its limit.
fn draw_detail(row: &Row, report: &TopReport, frame: &mut Frame<'_>, area: Rect) {
    let mut lines = Vec::new();
    if let Some(growth) = &row.growth {
        lines.push(plain::growth_line(growth));
    }
    lines.extend(row.limit.as_ref().map(plain::limit_line));
    lines.extend(row.faulted_in.as_ref().and_then(plain::parts));
    lines.extend(plain::main_stack(row));
    let room = usize::from(area.height.saturating_sub(2)).saturating_sub(lines.len());
    if let Some(stack) = row.stacks.first() {
        // The way in a line is in the lines above; here are its places, as far as there is room.
        let frames = View::of(&stack.stack).frames;
        lines.extend(
            frames
                .iter()
                .take(room)
                .map(|frame| format!("    {}  {}", name(frame), place(frame))),
        );
    }
    lines.extend(plain::remarks(&report.stack_sampling));
    let title = format!(
        " {} {} ",
        row.pid,
        crate::terminal::harmless(row.exe.as_deref().unwrap_or(&row.comm))
    );
    let block = Block::new()
        .borders(Borders::TOP | Borders::BOTTOM)
        .title(title);
    let lines: Vec<Line<'_>> = lines.into_iter().map(Line::from).collect();
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::top::report::{SCHEMA, StackSampling};

    fn report(pids: &[u32]) -> TopReport {
        TopReport {
            schema: SCHEMA,
            version: "0",
            started: String::new(),
            duration_s: 5.0,
            sample_interval_s: 1.0,
            processes_total: pids.len(),
            processes_growing: 0,
            stack_sampling: StackSampling::default(),
            processes: pids
                .iter()
                .map(|pid| Row {
                    pid: *pid,
                    comm: "evil\u{1b}[2J".to_owned(),
                    ..Row::default()
                })
                .collect(),
        }
    }

    fn press(code: KeyCode) -> KeyEvent {
        KeyEvent::new(code, KeyModifiers::NONE)
    }

    #[test]
    fn the_selection_stays_with_its_process() {
        let mut selection = Selection::default();
        let rows = report(&[1, 2, 3]).processes;
        assert_eq!(
            selection.key(press(KeyCode::Enter), &rows),
            Some(Wish::Attach(1))
        );
        selection.key(press(KeyCode::Down), &rows);
        assert_eq!(selection.pid, Some(2));
        let rows = report(&[2, 1, 3]).processes;
        selection.follow(&rows);
        assert_eq!(selection.table.selected(), Some(0));
        assert_eq!(
            selection.key(press(KeyCode::Char('a')), &rows),
            Some(Wish::Attach(2))
        );
        // It is gone.
        selection.follow(&report(&[1, 3]).processes);
        assert_eq!((selection.table.selected(), selection.pid), (None, None));
        selection.key(press(KeyCode::End), &rows);
        selection.key(press(KeyCode::End), &rows);
        assert_eq!(selection.pid, Some(3));
    }

    #[test]
    fn ctrl_c_and_q_quit() {
        let mut selection = Selection::default();
        let ctrl_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(selection.key(ctrl_c, &[]), Some(Wish::Quit));
        assert_eq!(
            selection.key(press(KeyCode::Char('q')), &[]),
            Some(Wish::Quit)
        );
        assert_eq!(selection.key(press(KeyCode::Char('c')), &[]), None);
        let ctrl_a = KeyEvent::new(KeyCode::Char('a'), KeyModifiers::CONTROL);
        let rows = report(&[1]).processes;
        assert_eq!(selection.key(ctrl_a, &rows), None);
        assert_eq!(selection.key(press(KeyCode::Enter), &[]), None);
    }

    #[test]
    fn what_is_said_takes_the_place_of_the_keys() {
        for line in [KEYS, " PID 77 has ended"] {
            let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
            let mut selection = Selection::default();
            terminal
                .draw(|frame| draw(&report(&[77]), &mut selection, line, frame))
                .unwrap();
            let shown = terminal.backend().to_string();
            let last = shown.lines().last().unwrap();
            assert!(last.contains(line.trim()), "{shown}");
        }
    }

    #[test]
    fn columns_without_room_are_left_out_and_none_is_cut() {
        assert_eq!(columns_for(200).len(), 11);
        assert_eq!(columns_for(80), [0, 1, 2, 3, 4, 10]);
        for width in 0..200 {
            let columns = columns_for(width);
            let used: usize = columns.iter().map(|column| WIDTHS[*column] + 1).sum();
            assert!(used <= width + 1, "{width}");
        }
    }

    #[test]
    fn every_size_of_terminal_will_do_and_names_are_harmless() {
        for (width, height) in [(200, 50), (80, 24), (20, 5), (1, 1)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            let mut selection = Selection::default();
            let report = report(&[77, 78]);
            selection.follow(&report.processes);
            terminal
                .draw(|frame| draw(&report, &mut selection, KEYS, frame))
                .unwrap();
            let shown = terminal.backend().to_string();
            assert!(!shown.contains('\u{1b}'));
            assert!(width < 80 || shown.contains("77"), "{shown}");
        }
    }
}

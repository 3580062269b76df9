//! Patterns for names, as shells have them.

/// Whether a name is of the form of a pattern, in which `*` stands for any text and `?` for any one
/// character.
#[must_use]
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut at, mut within) = (0, 0);
    // Where to go on if what follows the last `*` does not fit here.
    let mut again: Option<(usize, usize)> = None;
    while at < name.len() {
        let fits = |sign: &u8| match sign {
            b'?' => true,
            sign => *sign == name[at],
        };
        match pattern.get(within) {
            Some(b'*') => {
                within += 1;
                again = Some((at, within));
            }
            Some(sign) if fits(sign) => {
                at += 1;
                within += 1;
                // `?` takes a whole character.
                while within > 0
                    && pattern[within - 1] == b'?'
                    && name.get(at).is_some_and(|byte| byte & 0xc0 == 0x80)
                {
                    at += 1;
                }
            }
            _ => {
                let Some((from, after_star)) = again else {
                    return false;
                };
                at = from + 1;
                within = after_star;
                again = Some((at, after_star));
            }
        }
    }
    pattern[within..].iter().all(|sign| *sign == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("malloc", "malloc", true),
            ("malloc", "xmalloc", false),
            ("malloc", "malloc2", false),
            ("g_malloc*", "g_malloc", true),
            ("g_malloc*", "g_malloc0_n", true),
            ("*::operator new", "A::B::operator new", true),
            ("*::operator new", "operator new", false),
            ("a*b*c", "a_b_b_c", true),
            ("a*b*c", "a_b_b", false),
            ("?lloc", "alloc", true),
            ("?lloc", "élloc", true),
            ("?lloc", "lloc", false),
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("***a", "ba", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn a_pattern_that_nearly_fits_everywhere_takes_no_time() {
        let name = "a".repeat(10_000);
        assert!(!matches("*a*a*a*a*a*a*a*ab", &name));
    }
}

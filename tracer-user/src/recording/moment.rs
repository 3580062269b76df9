//! Moments of a session, as the user names them.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};

use super::Range;

/// A moment of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// So long after its begin.
    SinceBegin(Duration),
    /// So long before its end.
    BeforeEnd(Duration),
    /// At a time of day.
    At(SystemTime),
}

impl Moment {
    /// From `90`, `10m`, `-10m` or `2026-11-24T13:45:00Z`.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Ok(time) = humantime::parse_rfc3339_weak(text) {
            return Ok(Self::At(time));
        }
        let (length, moment) = match text.strip_prefix('-') {
            Some(length) => (length, Self::BeforeEnd as fn(Duration) -> Self),
            None => (text, Self::SinceBegin as fn(Duration) -> Self),
        };
        let seconds = length.parse().ok();
        let duration = match seconds {
            Some(seconds) => Duration::try_from_secs_f64(seconds).ok(),
            None => humantime::parse_duration(length).ok(),
        };
        duration.map(moment).ok_or_else(|| {
            "it is neither a time since the begin (90, 10m), before the end (-10m), nor of the day \
             (2026-11-24T13:45:00Z)"
                .to_owned()
        })
    }

    /// Since the session's begin.
    fn of(self, started: SystemTime, duration: Duration) -> Duration {
        match self {
            Self::SinceBegin(since) => since,
            Self::BeforeEnd(before) => duration.saturating_sub(before),
            Self::At(time) => time.duration_since(started).unwrap_or_default(),
        }
    }
}

impl Range {
    /// Between two moments of a session. Fails if nothing of it lies between them.
    pub fn between(
        from: Option<Moment>,
        to: Option<Moment>,
        started: &str,
        duration: Duration,
    ) -> anyhow::Result<Self> {
        let started = humantime::parse_rfc3339(started)
            .context("the recording does not tell when its session began")?;
        let of = |moment: Moment| moment.of(started, duration);
        let range = Self {
            from: from.map(of).filter(|from| !from.is_zero()),
            to: to.map(of).filter(|to| *to < duration),
            is_generation: false,
        };
        let (begin, end) = (range.from.unwrap_or_default(), range.to.unwrap_or(duration));
        ensure!(
            begin < end,
            "nothing was recorded from {} s to {} s: the session went on for {} s",
            begin.as_secs_f64(),
            end.as_secs_f64(),
            duration.as_secs_f64()
        );
        Ok(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn moments_are_named_in_three_ways() {
        for (text, moment) in [
            ("90", Moment::SinceBegin(Duration::from_secs(90))),
            ("0.5", Moment::SinceBegin(Duration::from_millis(500))),
            ("1h30m", Moment::SinceBegin(90 * MINUTE)),
            ("-10m", Moment::BeforeEnd(10 * MINUTE)),
            ("-30", Moment::BeforeEnd(MINUTE / 2)),
        ] {
            assert_eq!(Moment::parse(text), Ok(moment), "{text}");
        }
        assert!(matches!(
            Moment::parse("2026-11-24T13:45:00Z"),
            Ok(Moment::At(_))
        ));
        for wrong in ["", "-", "x", "10 parsecs", "--5", "1e400", "NaN"] {
            assert!(Moment::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_range_lies_in_its_session() {
        let range = |from: Option<&str>, to: Option<&str>| {
            let moment = |text: Option<&str>| text.map(|text| Moment::parse(text).unwrap());
            Range::between(
                moment(from),
                moment(to),
                "2026-11-24T12:00:00Z",
                10 * MINUTE,
            )
        };
        let whole = Range::default();
        assert_eq!(range(None, None).unwrap(), whole);
        assert_eq!(range(Some("0"), Some("20m")).unwrap(), whole);
        assert_eq!(range(Some("-1h"), None).unwrap(), whole);
        let last = range(Some("-1m"), None).unwrap();
        assert_eq!((last.from, last.to), (Some(9 * MINUTE), None));
        let noon = range(None, Some("2026-11-24T12:02:00Z")).unwrap();
        assert_eq!((noon.from, noon.to), (None, Some(2 * MINUTE)));
        assert!(range(Some("11m"), None).is_err());
        assert!(range(Some("5m"), Some("5m")).is_err());
        assert!(range(None, Some("2026-11-24T11:00:00Z")).is_err());
    }
}

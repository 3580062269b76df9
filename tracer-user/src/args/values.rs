//! What values of options look like. The errors are what clap puts behind the option's name.

use std::time::Duration;

/// A process's number.
pub(super) fn pid(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err("it is no process number (`pidof NAME` tells those of a program)".to_owned()),
    }
}

/// A process's number, name or path.
pub(super) fn target(text: &str) -> Result<String, String> {
    let is_number = text
        .strip_prefix('-')
        .unwrap_or(text)
        .parse::<u64>()
        .is_ok();
    match is_number {
        true => pid(text).map(|pid| pid.to_string()),
        false if text.is_empty() => Err("it names no process".to_owned()),
        false => Ok(text.to_owned()),
    }
}

/// At least one site.
pub(super) fn limit(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(limit) if limit > 0 => Ok(limit),
        _ => Err("it must be a number from 1 on".to_owned()),
    }
}

/// A number of bytes up to 1 GiB, as `524288`, `512k`, `512KiB` or `1M`.
pub(super) fn byte_size(text: &str) -> Result<u64, String> {
    bytes_between(text, 1, 1 << 30)
        .map_err(|error| error.unwrap_or("it must be from 1 byte to 1 GiB".to_owned()))
}

/// A number of bytes that a file may take.
pub(super) fn file_size(text: &str) -> Result<u64, String> {
    bytes_between(text, 1 << 20, 1 << 50)
        .map_err(|error| error.unwrap_or("it must be from 1 MiB to 1 PiB".to_owned()))
}

/// A number of bytes from one on to another; the error is empty if it is beyond them.
fn bytes_between(text: &str, least: u64, most: u64) -> Result<u64, Option<String>> {
    const NONE: &str = "it is no number of bytes (as 524288, 512k or 1M)";
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text[digits.len()..].to_ascii_lowercase();
    let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(Some(NONE.to_owned())),
    };
    let Ok(number) = digits.parse::<u64>() else {
        return Err(Some(NONE.to_owned()));
    };
    match number.checked_mul(1 << shift) {
        Some(bytes) if (least..=most).contains(&bytes) => Ok(bytes),
        _ => Err(None),
    }
}

/// A share, given in per cent, as `3%`, `3` or `0.5%`, or `off` for any.
pub(super) fn percent(text: &str) -> Result<f64, String> {
    if text == "off" {
        return Ok(f64::INFINITY);
    }
    let number = text.strip_suffix('%').unwrap_or(text).trim_end();
    match number.parse::<f64>() {
        Ok(percent) if (0.1..=1000.0).contains(&percent) => Ok(percent / 100.0),
        Ok(_) => Err("it must be from 0.1% to 1000%".to_owned()),
        Err(_) => Err("it is no percentage (as 5% or 0.5%), nor \"off\"".to_owned()),
    }
}

/// A positive number of seconds, fractions allowed.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let Ok(seconds) = text.parse::<f64>() else {
        return Err("it is no number of seconds".to_owned());
    };
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("it must be more than 0 seconds".to_owned()),
    }
}

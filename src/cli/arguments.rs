//! Arguments of the command line, parsed.

use std::path::PathBuf;

/// The address of a store, as an option or the environment gives it.
pub fn address(given: &str) -> Result<String, &'static str> {
    match given {
        "" => Err("the address is empty; expected a directory or a URI, or LAYERSTORE_URI not set, for ./layers"),
        given => Ok(given.to_owned()),
    }
}

/// A storage option. The error does not repeat what may be a secret.
pub fn storage_option(given: &str) -> Result<(String, String), &'static str> {
    match given.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE"),
    }
}

/// A directory of copies.
pub fn directory(given: &str) -> Result<PathBuf, &'static str> {
    match given {
        "" => Err("the directory is empty; expected one, or LAYERSTORE_CACHE not set"),
        given => Ok(given.into()),
    }
}

/// A number of bytes, with or without a unit: 1000000, 500MB, 20GiB.
pub fn size(given: &str) -> Result<u64, String> {
    let expected = || "expected a number of bytes, as 1000000, 500MB or 20GiB".to_owned();
    let digits = given.find(|c: char| !c.is_ascii_digit()).unwrap_or(given.len());
    let unit: u64 = match given[digits..].trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(expected()),
    };
    let number: u64 = given[..digits].parse().map_err(|_| expected())?;
    number.checked_mul(unit).ok_or_else(|| format!("{given} is more than can be counted"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("12"), Ok(12));
        assert_eq!(size("500MB"), Ok(500_000_000));
        assert_eq!(size("2 GiB"), Ok(2 << 30));
        for wrong in ["", "GiB", "-1", "1.5GB", "1XB", "99999999999TiB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}

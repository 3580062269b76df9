//! unfreed.
fn main() {}

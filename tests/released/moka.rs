//! A cache whose entries go when they have not been used for a while: moka-rs/moka#64, moka to 0.7.0.

use std::{thread::sleep, time::Duration};

use moka::unsync::CacheBuilder;

fn main() {
    let mut cache = CacheBuilder::new(100_000)
        .time_to_idle(Duration::from_secs(2))
        .build();
    println!("ready");
    for key in 0_u64.. {
        cache.insert(key, [key; 4]);
        sleep(Duration::from_millis(6));
    }
}

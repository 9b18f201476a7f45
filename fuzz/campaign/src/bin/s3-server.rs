//! The S3 server of the tests, by itself: `s3-server PORT [LATENCY_MS]`, for tests in other languages and for trying things out. It keeps
//! everything in memory, and prints the variables that lead to it.

use std::time::Duration;

// The server of the tests.
#[allow(dead_code, unused_imports)]
#[path = "../../../../tests/all/s3/mod.rs"]
mod server;

fn main() {
    let arguments: Vec<u64> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let port = arguments.first().and_then(|port| u16::try_from(*port).ok()).unwrap_or(0);
    let server = server::Server::start_at(port);
    server.latency(Duration::from_millis(arguments.get(1).copied().unwrap_or(0)));
    for (name, value) in server.environment() {
        println!("{name}={value}");
    }
    loop {
        std::thread::park();
    }
}

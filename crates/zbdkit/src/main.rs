//! zbdkit
fn main() {}

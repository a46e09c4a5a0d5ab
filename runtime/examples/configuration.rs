//! Prints docs/configuration.md, made from the table in the code.
//!
//! `cargo run -p moonrail --example configuration > docs/configuration.md`

fn main() {
    print!("{}", moonrail::config::reference());
}

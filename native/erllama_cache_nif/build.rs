//! The library keeps threads of its own, which hash. Were it unmapped while they run, as when its
//! module is deleted and purged, they would run into nothing: so it stays.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os != "macos") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}

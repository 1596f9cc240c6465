//! What the benchmarks are measured against, as NIFs.

use rustler::{Atom, Term};

rustler::atoms! { ok }

/// A call that does nothing, with as many arguments as the one it is the floor of.
#[rustler::nif]
fn nothing<'a>(_one: Term<'a>, _two: Term<'a>, _three: Term<'a>) -> Atom {
    ok()
}

rustler::init!("bench_nif");

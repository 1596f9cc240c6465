//! A node's secret as a resource object, so that no printed term shows its bytes.

use erllama_cache_core::kvc;
use rustler::{Binary, Error, NifResult, Resource, ResourceArc, Term};

use crate::atoms;
use crate::live_count::{Kind, Live};

pub(crate) struct Secret(kvc::Secret, #[allow(dead_code)] Live);

#[rustler::resource_impl]
impl Resource for Secret {}

impl Secret {
    pub(crate) fn core(&self) -> &kvc::Secret {
        &self.0
    }
}

/// `none`, or a secret.
pub(crate) fn optional<'a>(term: Term<'a>) -> NifResult<Option<&'a kvc::Secret>> {
    if atoms::none() == term {
        Ok(None)
    } else {
        term.decode::<&Secret>().map(|secret| Some(secret.core()))
    }
}

#[rustler::nif]
fn secret_new(bytes: Binary<'_>) -> NifResult<ResourceArc<Secret>> {
    let bytes = bytes.as_slice().try_into().map_err(|_| Error::BadArg)?;
    Ok(ResourceArc::new(Secret(
        kvc::Secret::new(bytes),
        Live::new(Kind::Secret),
    )))
}

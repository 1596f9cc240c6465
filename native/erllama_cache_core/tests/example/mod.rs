//! What is saved where a test does not care. One that cares about a field sets it and takes the
//! rest.

use erllama_cache_core::kvc::{FingerprintMode, Meta, SaveReason, Version};

/// Keyed by one token.
pub const META: Meta<'static> = Meta {
    version: Version::Tokens,
    save_reason: SaveReason::Cold,
    quant_bits: 16,
    quant_byte: 1,
    fingerprint: &[1; 32],
    fingerprint_mode: FingerprintMode::Safe,
    ctx_params_hash: &[2; 32],
    tokens: &[1, 0, 0, 0],
    context_size: 4096,
    creation_time: 1_700_000_000,
    last_used_time: 1_700_000_000,
    hit_count: 0,
    prompt_text: b"",
    hostname: b"",
    erllama_version: b"",
    save_reason_detail: b"",
};

#!/usr/bin/env python3
"""A reader and writer of KVC version 1 and 2 files that shares no code with the library.

It is the oracle of the format's tests: a test that compares a file of the library's with what
this makes of it compares two implementations. It is slow, and meant to be plain.

    kvc_oracle.py build META.json PAYLOAD OUT.kvc    write a file
    kvc_oracle.py show FILE.kvc                      print its fields as JSON
    kvc_oracle.py check [--host[=1|2]] FILE.kvc...   verify; exit 1 if any is bad; with --host also
                                                     what a host's parser refuses: a quant byte
                                                     that names no type, and with a version files
                                                     of the other
    kvc_oracle.py prefix FILE.kvc                    hex of all bytes before the payload,
                                                     extension tags (>= 0x80) removed

META.json holds a build_meta map: fingerprint and ctx_params_hash as hex, tokens as a list of
integers, everything else as a string or a number. What has a default in Erlang has to be there
(creation_time, last_used_time), or is left empty. "version" is 1 (the default) or 2.

The two versions differ in the version byte, in what the key is made of (1: the tokens, 2: the
prompt's bytes), and in save_reason 6, agent_prefix, which only version 2 has.

Python 3.8 or later is all it needs. With the package `blake3` it also checks tag 0xB3; keyed
digests when the environment variable KVC_KEY holds the key as 64 hex digits.
"""
import hashlib
import json
import os
import struct
import sys

QUANT = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 4, "q5_1": 5, "q8_0": 6,
    "q4_k_m": 7, "q4_k_s": 8, "q5_k_m": 9, "q5_k_s": 10, "q6_k": 11, "q8_k": 12,
    "q2_k": 13, "q3_k_s": 14, "q3_k_m": 15, "q3_k_l": 16, "iq2_xxs": 17, "iq2_xs": 18,
    "iq2_s": 19, "iq2_m": 20, "iq3_xxs": 21, "iq3_xs": 22, "iq3_s": 23, "iq3_m": 24,
    "iq1_s": 25, "iq1_m": 26, "iq4_nl": 27, "iq4_xs": 28, "bf16": 29,
}
REASON = {"unknown": 0, "cold": 1, "continued": 2, "evict": 3, "shutdown": 4, "finish": 5,
          "agent_prefix": 6}
LAST_REASON = {1: 5, 2: 6}
MODE = {"safe": 0, "gguf_chunked": 1, "fast_unsafe": 2}
HEADER = struct.Struct("<3sBBBHIIIIQQQ")   # 48 bytes
TRAILER = struct.Struct("<QQII")           # 24 bytes

_TABLE = []
for _i in range(256):
    _c = _i
    for _ in range(8):
        _c = (_c >> 1) ^ 0x82F63B78 if _c & 1 else _c >> 1
    _TABLE.append(_c)


def crc32c(data):
    c = 0xFFFFFFFF
    for b in data:
        c = _TABLE[(c ^ b) & 0xFF] ^ (c >> 8)
    return c ^ 0xFFFFFFFF


def encode_tokens(tokens):
    return b"".join(struct.pack("<I", t & 0xFFFFFFFF) for t in tokens)


def key(version, fingerprint, quant_byte, ctx_params_hash, tokens_bin, prompt):
    """Version 1: over the tokens, u32 little-endian each. Version 2: over the prompt's bytes."""
    last = tokens_bin if version == 1 else prompt
    return hashlib.sha256(
        fingerprint + bytes([quant_byte]) + ctx_params_hash + last).digest()


def build(meta, payload):
    tokens = meta["tokens"]
    version = meta.get("version", 1)
    if REASON[meta["save_reason"]] > LAST_REASON[version]:
        raise ValueError("version %d has no save_reason %s" % (version, meta["save_reason"]))
    tlvs = [
        (0x01, bytes.fromhex(meta["fingerprint"])),
        (0x02, bytes([MODE[meta["fingerprint_mode"]]])),
        (0x03, bytes([QUANT.get(meta["quant_type"], 255)])),
        (0x04, bytes.fromhex(meta["ctx_params_hash"])),
        (0x08, struct.pack("<I", len(tokens))),
        (0x09, encode_tokens(tokens)),
    ]
    for tag, name in ((0x05, "hostname"), (0x06, "erllama_version"), (0x07, "save_reason_detail")):
        value = meta.get(name, "").encode()
        if value:
            tlvs.append((tag, value))
    tlv = b"".join(struct.pack("<BI", t, len(v)) + v for t, v in tlvs)
    prompt = meta.get("prompt_text", "").encode()
    offset = HEADER.size + TRAILER.size + 4 + len(prompt) + 4 + len(tlv)
    header = HEADER.pack(
        b"KVC", version, meta["quant_bits"], REASON[meta["save_reason"]], 0, len(tokens),
        meta.get("hit_count", 0), meta["context_size"], 0,
        meta["creation_time"], meta["last_used_time"], len(payload))
    trailer = TRAILER.pack(offset, len(payload), crc32c(payload), 0)
    return (header + trailer + struct.pack("<I", len(prompt)) + prompt
            + struct.pack("<I", len(tlv)) + tlv + payload)


def parse(data):
    if len(data) < HEADER.size + TRAILER.size:
        raise ValueError("too short for a header")
    (magic, version, quant_bits, reason, _, token_count, hits, ctx, _,
     created, used, nbytes) = HEADER.unpack_from(data, 0)
    if magic != b"KVC" or version not in (1, 2):
        raise ValueError("not a KVC file of version 1 or 2")
    offset, length, crc, _ = TRAILER.unpack_from(data, HEADER.size)
    pos = HEADER.size + TRAILER.size

    def section(pos):
        if pos + 4 > len(data):
            raise ValueError("section length runs past the end")
        n, = struct.unpack_from("<I", data, pos)
        if pos + 4 + n > len(data):
            raise ValueError("section runs past the end")
        return data[pos + 4:pos + 4 + n], pos + 4 + n

    prompt, pos = section(pos)
    tlv, pos = section(pos)
    tags, i = {}, 0
    while i < len(tlv):
        if i + 5 > len(tlv):
            raise ValueError("TLV record cut short")
        tag, n = struct.unpack_from("<BI", tlv, i)
        if i + 5 + n > len(tlv):
            raise ValueError("TLV value cut short")
        tags[tag] = tlv[i + 5:i + 5 + n]
        i += 5 + n
    if length != nbytes:
        raise ValueError("payload length mismatch")
    if pos != offset:
        raise ValueError("payload offset %d, sections end at %d" % (offset, pos))
    if len(data) != offset + length:
        raise ValueError("file is %d bytes, expected %d" % (len(data), offset + length))
    for tag in (0x01, 0x02, 0x03, 0x04, 0x09):
        if tag not in tags:
            raise ValueError("tag 0x%02x is missing" % tag)
    for tag, size in ((0x01, 32), (0x02, 1), (0x03, 1), (0x04, 32)):
        if len(tags[tag]) != size:
            raise ValueError("tag 0x%02x has %d bytes" % (tag, len(tags[tag])))
    return {
        "version": version, "quant_bits": quant_bits, "save_reason": reason,
        "cached_token_count": token_count,
        "hit_count": hits, "context_size": ctx, "creation_time": created,
        "last_used_time": used, "payload_offset": offset, "payload_length": length,
        "payload_crc32c": crc, "prompt_text": prompt, "tags": tags,
        "key": key(version, tags[0x01], tags[0x03][0], tags[0x04], tags[0x09], prompt),
        "payload": data[offset:],
    }


DIGEST_TAG = 0xB3


def digest(data, fields):
    """The 32 bytes that tag 0xB3 must hold: BLAKE3 over the payload, then over the prefix
    with hit_count, last_used_time and the digest itself as zero. None without the package."""
    try:
        import blake3
    except ImportError:
        return None
    value = fields["tags"][DIGEST_TAG]
    if len(value) != 33 or value[0] not in (0, 1):
        raise ValueError("tag 0xb3 is malformed")
    prefix = bytearray(data[:fields["payload_offset"]])
    prefix[12:16] = bytes(4)
    prefix[32:40] = bytes(8)
    at = bytes(prefix).index(struct.pack("<BI", DIGEST_TAG, 33) + value) + 6
    prefix[at:at + 32] = bytes(32)
    if value[0] == 1:
        secret = os.environ.get("KVC_KEY")
        if secret is None:
            return None
        h = blake3.blake3(key=bytes.fromhex(secret))
    else:
        h = blake3.blake3()
    h.update(fields["payload"])
    h.update(bytes(prefix))
    return h.digest()


def check(path, host=()):
    """Raise ValueError unless every stored check of the file holds."""
    with open(path, "rb") as f:
        data = f.read()
    fields = parse(data)
    payload, tags = fields["payload"], fields["tags"]
    actual = crc32c(payload)
    if actual != fields["payload_crc32c"]:
        raise ValueError("crc32c %08x, stored %08x" % (actual, fields["payload_crc32c"]))
    if len(tags[0x09]) != 4 * fields["cached_token_count"]:
        raise ValueError("token count mismatch")
    if host and fields["version"] not in host:
        raise ValueError("version %d is not the host's" % fields["version"])
    if fields["save_reason"] > LAST_REASON[fields["version"]]:
        raise ValueError("version %d has no save_reason %d"
                         % (fields["version"], fields["save_reason"]))
    if host and tags[0x03][0] not in QUANT.values():
        raise ValueError("quant byte %d names no type" % tags[0x03][0])
    name = os.path.basename(path)
    if name != fields["key"].hex() + ".kvc":
        raise ValueError("file name is not its key, %s" % fields["key"].hex())
    if DIGEST_TAG in tags:
        expected = digest(data, fields)
        if expected is not None and expected != tags[DIGEST_TAG][1:]:
            raise ValueError("blake3 mismatch")
    return fields


def stripped_prefix(data):
    """The bytes before the payload as a writer without extension tags would have put them."""
    fields = parse(data)
    kept = []
    tlv_len_at = HEADER.size + TRAILER.size + 4 + len(fields["prompt_text"])
    i = tlv_len_at + 4
    while i < fields["payload_offset"]:
        tag, n = struct.unpack_from("<BI", data, i)
        if tag < 0x80:
            kept.append(data[i:i + 5 + n])
        i += 5 + n
    tlv = b"".join(kept)
    offset = tlv_len_at + 4 + len(tlv)
    trailer = TRAILER.pack(offset, fields["payload_length"], fields["payload_crc32c"], 0)
    return (data[:HEADER.size] + trailer + data[HEADER.size + TRAILER.size:tlv_len_at]
            + struct.pack("<I", len(tlv)) + tlv)


def main(argv):
    if len(argv) == 4 and argv[0] == "build":
        with open(argv[1], encoding="utf-8") as f:
            meta = json.load(f)
        with open(argv[2], "rb") as f:
            payload = f.read()
        with open(argv[3], "wb") as f:
            f.write(build(meta, payload))
        return 0
    if len(argv) == 2 and argv[0] == "show":
        with open(argv[1], "rb") as f:
            fields = parse(f.read())
        fields.pop("payload")
        fields["tags"] = {"0x%02x" % t: v.hex() for t, v in fields["tags"].items()}
        fields["key"] = fields["key"].hex()
        fields["prompt_text"] = fields["prompt_text"].decode("utf-8", "replace")
        print(json.dumps(fields, indent=2))
        return 0
    if len(argv) == 2 and argv[0] == "prefix":
        with open(argv[1], "rb") as f:
            print(stripped_prefix(f.read()).hex())
        return 0
    if len(argv) >= 2 and argv[0] == "check":
        bad = 0
        hosts = {"--host": (1, 2), "--host=1": (1,), "--host=2": (2,)}
        host = hosts.get(argv[1], ())
        for path in argv[2 if host else 1:]:
            try:
                check(path, host)
                print("ok   %s" % path)
            except (ValueError, OSError) as e:
                bad += 1
                print("BAD  %s: %s" % (path, e))
        return 1 if bad else 0
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

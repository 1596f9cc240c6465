import Config

# Where the node runs, not where it was built. The directory has to exist.
config :erllama_cache_nif,
  stores: [
    kv: %{root: System.get_env("KV_ROOT", "/tmp/elixir_kv"), max_bytes: 1_000_000_000}
  ]

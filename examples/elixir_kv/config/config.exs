import Config

config :erllama_cache_nif, max_concurrent: 4

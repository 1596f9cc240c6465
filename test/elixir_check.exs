# Elixir calls the writer as any Erlang module: a save and a load.
ExUnit.start()

defmodule ElixirCheck do
  use ExUnit.Case

  test "saves and loads" do
    root = Path.join(System.tmp_dir!(), "elixir_check_#{System.unique_integer([:positive])}_#{System.pid()}")
    File.mkdir_p!(root)
    on_exit(fn -> File.rm_rf!(root) end)

    {:ok, _} = :erllama_cache_store.start_link(:elixir_store, %{root: root})
    {:ok, _} = :erllama_cache_writer.start_link(%{host: :erllama_cache_store})

    meta = %{
      save_reason: :cold,
      quant_bits: 16,
      fingerprint: <<1::256>>,
      fingerprint_mode: :safe,
      quant_type: :f16,
      ctx_params_hash: <<2::256>>,
      tokens: Enum.to_list(1..100),
      context_size: 4096
    }

    payload = :crypto.strong_rand_bytes(100_000)
    {:ok, key} = :erllama_cache_writer.save(:elixir_store, :disk, meta, payload)
    assert {:ok, info, ^payload} = :erllama_cache_store.load(:elixir_store, key)
    assert info.tokens == meta.tokens
    assert {:error, :already_present} = :erllama_cache_writer.save(:elixir_store, :disk, meta, payload)
    assert :erllama_cache_writer.current() == 0
  end
end

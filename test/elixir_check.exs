# Elixir calls the writer and the store as it calls any Erlang module. What a save does is the
# business of the Erlang tests; this checks that nothing about it needs to be Erlang.
ExUnit.start(capture_log: true)

# The guide's Elixir as it is printed: the dependency, the configuration, and what is done then.
defmodule GuideCheck do
  use ExUnit.Case

  @guide Path.join(__DIR__, "../docs/guide/elixir.md")
  @app :erllama_cache_nif

  setup do
    root = Path.join(System.tmp_dir!(), "guide_check_#{System.pid()}")
    File.mkdir!(root)

    on_exit(fn ->
      _ = Application.stop(@app)
      for {key, _} <- Application.get_all_env(@app), do: Application.delete_env(@app, key)
      File.rm_rf!(root)
    end)

    # The directory that the guide names is not this machine's.
    blocks =
      for [_, code] <- Regex.scan(~r/^```elixir\n(.*?)^```$/ms, File.read!(@guide)) do
        String.replace(code, "/tmp/kv", root)
      end

    {:ok, root: root, blocks: blocks}
  end

  test "the dependency is this application", %{blocks: [deps | _]} do
    assert {:defp, _, [{:deps, _, nil}, [do: list]]} = Code.string_to_quoted!(deps)
    assert {[erllama_cache_nif: [path: _]], _} = Code.eval_quoted(list)
  end

  test "configured, the application does what is shown", %{root: root, blocks: blocks} do
    [_deps, config, session, _by_hand] = blocks
    file = Path.join(root, "config.exs")
    File.write!(file, config)
    Application.put_all_env(Config.Reader.read!(file))
    File.rm!(file)
    {:ok, _} = Application.ensure_all_started(@app)

    {_, bindings} = Code.eval_string(session)
    # It has deleted what it saved.
    assert :erllama_cache_store.load(:my_store, bindings[:key]) == :miss
    assert :erllama_cache_writer.max_concurrent() == 4
  end

  test "by hand it does the same", %{blocks: blocks} do
    [_deps, _config, session, by_hand] = blocks
    {_, _} = Code.eval_string(by_hand <> session)
    for server <- [:erllama_cache_writer, :my_store], do: GenServer.stop(server)
  end
end

defmodule ElixirCheck do
  use ExUnit.Case

  alias :erllama_cache_store, as: Store
  alias :erllama_cache_writer, as: Writer

  setup do
    unique = "elixir_check_#{System.pid()}_#{System.unique_integer([:positive])}"
    root = Path.join(System.tmp_dir!(), unique)
    File.mkdir!(root)
    on_exit(fn -> File.rm_rf!(root) end)

    start_supervised!(Store.child_spec(__MODULE__, %{root: root}))
    start_supervised!(%{id: Writer, start: {Writer, :start_link, [%{host: Store}]}})

    meta = %{
      save_reason: :cold,
      quant_bits: 16,
      fingerprint: <<1::256>>,
      fingerprint_mode: :safe,
      quant_type: :f16,
      ctx_params_hash: <<2::256>>,
      tokens: Enum.to_list(1..100),
      context_size: 4096,
      prompt_text: "Grüße aus Elixir"
    }

    {:ok, root: root, meta: meta}
  end

  test "loads what it saves", %{root: root, meta: meta} do
    payload = :crypto.strong_rand_bytes(100_000)
    assert {:ok, key} = Writer.save(__MODULE__, :disk, meta, payload)
    assert {:ok, ^key} = Store.key(meta)
    assert File.ls!(root) == [Base.encode16(key, case: :lower) <> ".kvc"]

    assert {:ok, info, ^payload} = Store.load(__MODULE__, key)
    assert Map.take(info, Map.keys(meta)) == %{meta | tokens: info.tokens}
    assert for(<<token::little-32 <- info.tokens>>, do: token) == meta.tokens
    assert Writer.current() == 0

    assert :ok = Store.delete(__MODULE__, key)
    assert :miss = Store.load(__MODULE__, key)
  end

  test "saves a key once", %{meta: meta} do
    assert {:ok, key} = Writer.save(__MODULE__, :disk, meta, "first")
    assert {:error, :already_present} = Writer.save(__MODULE__, :disk, meta, "second", 0)
    assert {:ok, _info, "first"} = Store.load(__MODULE__, key)
    assert %{saves: 1, duplicates: 1} = Store.info(__MODULE__)
  end

  test "says what is wrong with a map", %{root: root, meta: meta} do
    save = &Writer.save(__MODULE__, :disk, &1, "payload")
    assert {:error, {:missing_key, :tokens}} = save.(Map.delete(meta, :tokens))
    # A string of Elixir's is a binary, a charlist is not.
    assert {:error, {:invalid_meta, :prompt_text}} = save.(%{meta | prompt_text: ~c"charlist"})
    assert {:error, {:invalid_meta, :tokens}} = save.(%{meta | tokens: [1, "two"]})
    # nil is an atom, and no number.
    assert {:error, {:invalid_meta, :context_size}} = save.(%{meta | context_size: nil})
    assert File.ls!(root) == []
    assert {:ok, _key} = save.(meta)
  end

  test "runs a function with a slot" do
    assert {:ok, 1} == Writer.with_slot(:infinity, fn -> Writer.current() end)
    assert_raise RuntimeError, fn -> Writer.with_slot(0, fn -> raise "on purpose" end) end
    assert Writer.current() == 0
    :ok = stop_supervised(Writer)
    assert {:noproc, _} = catch_exit(Writer.acquire(0))
  end
end

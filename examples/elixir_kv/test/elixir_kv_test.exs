defmodule ElixirKVTest do
  # No test finds what another has saved: each has a model of its own.
  use ExUnit.Case, async: true

  @tokens [1, 15043, 3186]

  setup do
    model = %{
      fingerprint: :crypto.strong_rand_bytes(32),
      quant_type: :f16,
      quant_bits: 16,
      ctx_params_hash: <<2::256>>,
      context_size: 4096
    }

    %{model: model}
  end

  test "what was saved is loaded", %{model: model} do
    assert ElixirKV.load(model, @tokens) == :miss
    assert ElixirKV.save(model, @tokens, "the model's state") == :ok
    assert ElixirKV.load(model, @tokens) == {:ok, "the model's state"}
    assert ElixirKV.load(model, [0 | @tokens]) == :miss
  end

  test "saving again is no error and changes nothing", %{model: model} do
    assert ElixirKV.save(model, @tokens, "first") == :ok
    assert ElixirKV.save(model, @tokens, "second") == :ok
    assert ElixirKV.load(model, @tokens) == {:ok, "first"}
  end

  test "a save in the background", %{model: model} do
    state = :crypto.strong_rand_bytes(8_000_000)
    ref = ElixirKV.save_async(model, @tokens, state)
    assert ElixirKV.await(ref) == :ok
    assert ElixirKV.load(model, @tokens) == {:ok, state}
  end

  test "a save in the background that takes too long is there or is not", %{model: model} do
    state = :crypto.strong_rand_bytes(8_000_000)
    ref = ElixirKV.save_async(model, @tokens, state)

    case ElixirKV.await(ref, 0) do
      :ok ->
        assert ElixirKV.load(model, @tokens) == {:ok, state}

      {:error, error} ->
        assert error.reason == :cancelled
        assert ElixirKV.load(model, @tokens) == :miss
    end

    refute_received {:erllama_cache_writer, ^ref, _}
  end

  test "an error can be matched, read and raised", %{model: model} do
    words = "the build_meta's fingerprint has the wrong type or size"
    wrong = %{model | fingerprint: "too short"}

    assert {:error, %ElixirKV.Error{reason: {:invalid_meta, :fingerprint}} = error} =
             ElixirKV.save(wrong, @tokens, "x")

    assert Exception.message(error) == words
    assert_raise ElixirKV.Error, words, fn -> raise error end
    assert {:error, ^error} = ElixirKV.load(wrong, @tokens)
  end

  test "what takes long is logged by an event", %{model: model} do
    :ok = ElixirKV.Telemetry.attach(slow_ms: 0)

    log =
      ExUnit.CaptureLog.capture_log(fn ->
        :ok = ElixirKV.save(model, @tokens, "the model's state")
        {:ok, _state} = ElixirKV.load(model, @tokens)
      end)

    assert log =~ ~r/save of kv took \d+ ms: :ok/
    assert log =~ ~r/load of kv took \d+ ms: :ok/
  end
end

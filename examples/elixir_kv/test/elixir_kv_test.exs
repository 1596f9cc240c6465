defmodule ElixirKVTest do
  use ExUnit.Case

  @tokens [1, 15043, 3186]

  # A model of its own for each test, so that no test finds what another has saved.
  setup do
    model = %{
      fingerprint: :crypto.strong_rand_bytes(32),
      quant_type: :f16,
      quant_bits: 16,
      ctx_params_hash: <<2::256>>,
      context_size: 4096
    }

    {:ok, model: model}
  end

  test "what was saved is loaded", %{model: model} do
    assert ElixirKV.load(model, @tokens) == :miss
    assert ElixirKV.save(model, @tokens, "the model's state") == :ok
    assert ElixirKV.load(model, @tokens) == {:ok, "the model's state"}
    assert ElixirKV.load(model, [1 | @tokens]) == :miss
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

  test "an error has words", %{model: model} do
    assert ElixirKV.save(%{model | quant_bits: 256}, @tokens, "x") ==
             {:error, "the build_meta's quant_bits has the wrong type or size"}
  end
end

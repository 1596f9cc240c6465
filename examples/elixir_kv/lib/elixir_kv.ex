defmodule ElixirKV do
  @moduledoc """
  The state of a language model, kept by the tokens that it has read.

  A small module around `:erllama_cache_writer` and `:erllama_cache_store`, to start one's own from.
  The store `:kv` is configured in `config/runtime.exs` and started with the application
  `:erllama_cache_nif`.

      :ok = ElixirKV.save(model, [1, 15043, 3186], state)
      {:ok, ^state} = ElixirKV.load(model, [1, 15043, 3186])
      :miss = ElixirKV.load(model, [1, 15043])
  """

  alias ElixirKV.Error

  @store :kv

  @typedoc "What makes a state what it is: the model, how its state is laid out, its context."
  @type model :: %{
          fingerprint: <<_::256>>,
          quant_type: atom(),
          quant_bits: byte(),
          ctx_params_hash: <<_::256>>,
          context_size: pos_integer()
        }

  @type tokens :: [non_neg_integer()]

  @doc """
  Saves a state and returns when it is on the disk. That it is there already is as good.
  """
  @spec save(model(), tokens(), binary()) :: :ok | {:error, Error.t()}
  def save(model, tokens, state) do
    @store
    |> :erllama_cache_writer.save(:disk, meta(model, tokens), state)
    |> outcome()
  end

  @doc """
  Saves a state in the background, so that the caller goes on at once. `await/2` tells what came of it.
  """
  @spec save_async(model(), tokens(), binary()) :: reference()
  def save_async(model, tokens, state) do
    {:ok, ref} = :erllama_cache_writer.save_async(@store, :disk, meta(model, tokens), state)
    ref
  end

  @doc """
  Waits, in the process that began it, for the end of a save of `save_async/3`.

  When it has not ended after `timeout` milliseconds it is cancelled, and leaves nothing.
  """
  @spec await(reference(), timeout()) :: :ok | {:error, Error.t()}
  def await(ref, timeout \\ 30_000) do
    receive do
      {:erllama_cache_writer, ^ref, result} -> outcome(result)
    after
      timeout ->
        # It is told what has come of it all the same: it may have ended in between.
        :ok = :erllama_cache_writer.cancel(ref)
        await(ref, :infinity)
    end
  end

  @doc """
  Loads the state of exactly these tokens.
  """
  @spec load(model(), tokens()) :: {:ok, binary()} | :miss | {:error, Error.t()}
  def load(model, tokens) do
    with {:ok, key} <- :erllama_cache_store.key(meta(model, tokens)),
         {:ok, _info, state} <- :erllama_cache_store.load(@store, key) do
      {:ok, state}
    else
      :miss -> :miss
      {:error, reason} -> {:error, %Error{reason: reason}}
    end
  end

  defp outcome({:ok, _key}), do: :ok
  defp outcome({:error, :already_present}), do: :ok
  defp outcome({:error, reason}), do: {:error, %Error{reason: reason}}

  defp meta(model, tokens) do
    Map.merge(model, %{save_reason: :cold, fingerprint_mode: :safe, tokens: tokens})
  end
end

defmodule ElixirKV do
  @moduledoc """
  The state of a language model, kept by the tokens that it has read.

  A small module around `:erllama_cache_writer` and `:erllama_cache_store`, to start one's own from.
  The store `:kv` is configured in `config/config.exs` and started with the application
  `:erllama_cache_nif`.
  """

  @store :kv

  @typedoc "What makes a state what it is: the model, how its state is laid out, its context."
  @type model :: %{
          fingerprint: <<_::256>>,
          quant_type: atom(),
          quant_bits: byte(),
          ctx_params_hash: <<_::256>>,
          context_size: pos_integer()
        }

  @doc """
  Saves a state and returns when it is on the disk. That it is there already is as good.

      iex> ElixirKV.save(model, [1, 15043, 3186], state)
      :ok
  """
  @spec save(model(), [non_neg_integer()], binary()) :: :ok | {:error, String.t()}
  def save(model, tokens, state) do
    @store
    |> :erllama_cache_writer.save(:disk, meta(model, tokens), state)
    |> outcome()
  end

  @doc """
  Saves a state in the background, so that the caller goes on at once. `await/1` tells what came of it.
  """
  @spec save_async(model(), [non_neg_integer()], binary()) :: reference()
  def save_async(model, tokens, state) do
    {:ok, ref} = :erllama_cache_writer.save_async(@store, :disk, meta(model, tokens), state)
    ref
  end

  @doc "Waits for the end of a save that `save_async/3` began."
  @spec await(reference()) :: :ok | {:error, String.t()}
  def await(ref) do
    receive do
      {:erllama_cache_writer, ^ref, result} -> outcome(result)
    end
  end

  @doc """
  Loads the state of exactly these tokens.

      iex> ElixirKV.load(model, [1, 15043, 3186])
      {:ok, state}
  """
  @spec load(model(), [non_neg_integer()]) :: {:ok, binary()} | :miss | {:error, String.t()}
  def load(model, tokens) do
    {:ok, key} = :erllama_cache_store.key(meta(model, tokens))

    case :erllama_cache_store.load(@store, key) do
      {:ok, _info, state} -> {:ok, state}
      :miss -> :miss
      {:error, reason} -> {:error, message(reason)}
    end
  end

  defp outcome({:ok, _key}), do: :ok
  defp outcome({:error, :already_present}), do: :ok
  defp outcome({:error, reason}), do: {:error, message(reason)}

  defp message(reason), do: reason |> :erllama_cache_writer.format_error() |> to_string()

  defp meta(model, tokens) do
    Map.merge(model, %{save_reason: :cold, fingerprint_mode: :safe, tokens: tokens})
  end
end

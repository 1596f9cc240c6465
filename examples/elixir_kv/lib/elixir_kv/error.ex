defmodule ElixirKV.Error do
  @moduledoc """
  Why a state was not saved or loaded: `reason` as `:erllama_cache_writer` has it, to match on, and
  in words by `Exception.message/1`. It may also be raised.
  """

  @type t :: %__MODULE__{reason: term()}

  @enforce_keys [:reason]
  defexception [:reason]

  @impl true
  def message(%__MODULE__{reason: reason}) do
    reason |> :erllama_cache_writer.format_error() |> List.to_string()
  end
end

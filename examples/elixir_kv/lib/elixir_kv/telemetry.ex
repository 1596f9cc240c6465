defmodule ElixirKV.Telemetry do
  @moduledoc """
  Logs saves, loads and fetches that take long, by the events that `:erllama_cache_nif` sends where a
  node has the library `:telemetry`.

  A project that uses this has `{:telemetry, "~> 1.0"}` among its dependencies.

      :ok = ElixirKV.Telemetry.attach(slow_ms: 100)
  """

  require Logger

  # It is no dependency of this example, which is built without packages.
  @compile {:no_warn_undefined, :telemetry}

  @events for what <- [:save, :load, :fetch],
              suffix <- [:stop, :exception],
              do: [:erllama_cache, what, suffix]

  @doc """
  Attaches the handler. Options: `slow_ms`, from how many milliseconds on something is logged.
  """
  @spec attach(slow_ms: non_neg_integer()) :: :ok | {:error, :already_exists}
  def attach(options \\ []) do
    slow = System.convert_time_unit(Keyword.get(options, :slow_ms, 100), :millisecond, :native)
    :telemetry.attach_many(__MODULE__, @events, &__MODULE__.handle/4, slow)
  end

  @doc false
  def handle([_, what, :stop], %{duration: duration}, metadata, slow) when duration >= slow do
    Logger.info(
      "#{what} of #{metadata.name} took #{ms(duration)} ms: #{inspect(metadata.result)}"
    )
  end

  def handle([_, what, :exception], _measurements, metadata, _slow) do
    Logger.error("#{what} of #{metadata.name} raised #{inspect(metadata.reason)}")
  end

  def handle(_event, _measurements, _metadata, _slow), do: :ok

  defp ms(duration), do: System.convert_time_unit(duration, :native, :millisecond)
end

defmodule ElixirKV.MixProject do
  use Mix.Project

  def project do
    [
      app: :elixir_kv,
      version: "0.1.0",
      elixir: "~> 1.14",
      start_permanent: Mix.env() == :prod,
      elixirc_paths: elixirc_paths(Mix.env()),
      deps: deps()
    ]
  end

  def application do
    [extra_applications: [:logger]]
  end

  # A stand-in for a package that the tests can do without.
  defp elixirc_paths(:test), do: ["lib", "test/support"]
  defp elixirc_paths(_env), do: ["lib"]

  defp deps do
    [{:erllama_cache_nif, path: "../.."}]
  end
end

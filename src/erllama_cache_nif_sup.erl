%% Starts what the application's environment names: stores and, with them, the writer. With no
%% stores it starts nothing: inside erllama the writer is a child of erllama's own supervisor.
%%
%% @private
-module(erllama_cache_nif_sup).
-behaviour(supervisor).

-export([start_link/0]).
-export([init/1]).

start_link() ->
    supervisor:start_link({local, ?MODULE}, ?MODULE, []).

init([]) ->
    {ok, {#{strategy => one_for_one}, children(application:get_env(erllama_cache_nif, stores, []))}}.

children([]) ->
    [];
children(Stores) ->
    [erllama_cache_store:child_spec(Name, Options) || {Name, Options} <- Stores] ++ [writer()].

writer() ->
    %% Where nothing else is said, the stores are the host.
    Host = application:get_env(erllama_cache_nif, host, erllama_cache_store),
    #{
        id => erllama_cache_writer,
        start => {erllama_cache_writer, start_link, [#{host => Host}]},
        shutdown => 5000
    }.

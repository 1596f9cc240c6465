%% Starts the stores that the application's environment names and, with them, the writer. Without
%% stores it starts neither: inside erllama the writer is a child of erllama's own supervisor. What
%% it starts in any case is the server that waits for pending saves when the application stops.
%%
%% Each server has its own keeper, so that none ends another.
%%
%% @private
-module(erllama_cache_nif_sup).
-behaviour(supervisor).

-export([start_link/0]).
-export([init/1]).

%% @doc Starts all servers or none: a server that cannot start now is probably configured wrongly. A
%% server that ends later is restarted.
-spec start_link() -> {ok, pid()} | {error, term()}.
start_link() ->
    case supervisor:start_link({local, ?MODULE}, ?MODULE, []) of
        {ok, Supervisor} -> all_or_none(Supervisor);
        {error, _} = Error -> Error
    end.

all_or_none(Supervisor) ->
    Failures = [
        {Id, Reason}
     || {Id, Keeper, worker, _} <- supervisor:which_children(Supervisor),
        {failed, Reason} <- [erllama_cache_keeper:failure(Keeper)]
    ],
    case Failures of
        [] ->
            {ok, Supervisor};
        [Failure | _] ->
            true = unlink(Supervisor),
            Monitor = monitor(process, Supervisor),
            true = exit(Supervisor, shutdown),
            receive
                {'DOWN', Monitor, process, Supervisor, _} -> {error, Failure}
            end
    end.

init([]) ->
    {Stores, Writer} = children(application:get_env(erllama_cache_nif, stores, [])),
    %% Stopped in reverse: pending saves need their stores.
    Children = Stores ++ [erllama_cache_drain:child_spec()] ++ Writer,
    %% Keepers end only when they are killed.
    {ok, {#{strategy => one_for_one, intensity => 100, period => 1}, Children}}.

children([]) ->
    {[], []};
children(Stores) when is_list(Stores) ->
    {[store(Store) || Store <- Stores], writer()};
children(Other) ->
    error({invalid_config, stores, Other}).

store({Name, Options}) when is_atom(Name), is_map(Options) orelse is_list(Options) ->
    #{start := Start} = erllama_cache_store:child_spec(Name, Options),
    erllama_cache_keeper:child_spec(Name, Start);
store(Other) ->
    error({invalid_config, stores, Other}).

writer() ->
    %% By default the stores are the host. In a node that runs erllama, the writer is erllama's
    %% child and serves the stores as well.
    case application:get_env(erllama_cache_nif, start_writer, not is_loaded(erllama)) of
        true ->
            Host = application:get_env(erllama_cache_nif, host, erllama_cache_store),
            Start = {erllama_cache_writer, start_link, [#{host => Host}]},
            [erllama_cache_keeper:child_spec(erllama_cache_writer, Start)];
        false ->
            [];
        Other ->
            error({invalid_config, start_writer, Other})
    end.

is_loaded(Application) ->
    lists:keymember(Application, 1, application:loaded_applications()).

%% Refuses the waiters of a server that crashed and was not replaced. They go on waiting while a
%% supervisor restarts the server; if the supervisor has given up, this process ends their wait. It
%% lives as long as the server, and a minute longer after a crash.
%%
%% @private
-module(erllama_cache_abandon).
-behaviour(gen_server).

-export([after_crash_of/2]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

%% Milliseconds that a supervisor has to start a new server: longer than any pauses between starts.
-define(REPLACED_WITHIN, 60000).

-spec after_crash_of(Server :: pid(), erllama_cache_nif:semaphore()) -> ok.
after_crash_of(Server, Semaphore) ->
    {ok, _} = gen_server:start(?MODULE, {Server, Semaphore}, []),
    ok.

init({Server, Semaphore}) ->
    _ = monitor(process, Server),
    {ok, Semaphore}.

handle_call(_Request, _From, Semaphore) ->
    {reply, {error, unknown_call}, Semaphore}.

handle_cast(_Request, Semaphore) ->
    {noreply, Semaphore}.

handle_info({'DOWN', _, process, _, Reason}, Semaphore) ->
    case erllama_cache_successor:is_stop(Reason) of
        true ->
            %% The server has refused its waiters itself.
            {stop, normal, Semaphore};
        false ->
            _ = erlang:start_timer(?REPLACED_WITHIN, self(), no_server),
            {noreply, Semaphore}
    end;
handle_info({timeout, _, no_server}, Semaphore) ->
    ok = erllama_cache_nif:semaphore_abandon(Semaphore),
    {stop, normal, Semaphore};
handle_info(_Message, Semaphore) ->
    {noreply, Semaphore}.

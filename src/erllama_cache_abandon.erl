%% Whoever waits for a slot goes on waiting while a server that crashed is replaced. Where nobody
%% replaces it, because its supervisor has given up, somebody has to tell them: this process, which
%% lives as long as the server, and a minute longer after a crash.
%%
%% @private
-module(erllama_cache_abandon).
-behaviour(gen_server).

-export([after_crash_of/2]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

%% Milliseconds that a supervisor has for a new server: longer than any waits between two starts.
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
    case Reason of
        %% The server has told them itself.
        normal -> {stop, normal, Semaphore};
        shutdown -> {stop, normal, Semaphore};
        {shutdown, _} -> {stop, normal, Semaphore};
        _ ->
            _ = erlang:start_timer(?REPLACED_WITHIN, self(), no_server),
            {noreply, Semaphore}
    end;
handle_info({timeout, _, no_server}, Semaphore) ->
    ok = erllama_cache_nif:semaphore_abandon(Semaphore),
    {stop, normal, Semaphore};
handle_info(_Message, Semaphore) ->
    {noreply, Semaphore}.

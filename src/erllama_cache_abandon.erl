%% Refuses the waiters of a server that crashed and was not replaced. They go on waiting while a
%% supervisor restarts the server; if the supervisor has given up, this process ends their wait. It
%% lives as long as the server, and a minute longer after a crash. Each server has its own: if one
%% follows and crashes within that minute, its waiters have a minute of their own.
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
    Start = atomics:add_get(starts(), 1, 1),
    {ok, _} = gen_server:start(?MODULE, {Server, Start, Semaphore}, []),
    ok.

%% How many servers have started; one at a time does. It is never replaced: that would make the VM
%% scan the heaps of all processes.
starts() ->
    case persistent_term:get(?MODULE, undefined) of
        undefined ->
            Starts = atomics:new(1, []),
            ok = persistent_term:put(?MODULE, Starts),
            Starts;
        Starts ->
            Starts
    end.

init({Server, Start, Semaphore}) ->
    _ = monitor(process, Server),
    {ok, {Start, Semaphore}}.

handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

handle_cast(_Request, State) ->
    {noreply, State}.

handle_info({'DOWN', _, process, _, Reason}, State) ->
    case erllama_cache_successor:is_stop(Reason) of
        true ->
            %% The server has refused its waiters itself.
            {stop, normal, State};
        false ->
            _ = erlang:start_timer(?REPLACED_WITHIN, self(), no_server),
            {noreply, State}
    end;
handle_info({timeout, _, no_server}, {Start, Semaphore} = State) ->
    ok = case atomics:get(starts(), 1) of
        Start -> erllama_cache_nif:semaphore_abandon(Semaphore);
        _Later -> ok
    end,
    {stop, normal, State};
handle_info(_Message, State) ->
    {noreply, State}.

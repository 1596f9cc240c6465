%% Keeps one server of this application running. It restarts the server at once when that ends, and
%% with growing pauses for as long as the server does not start or does not last.
%%
%% A supervisor would give up after some tries and end all its children. A store whose root is away
%% (a disk unplugged, a file server that does not answer) must not end the other stores, and must
%% come back with its root.
%%
%% @private
-module(erllama_cache_keeper).
-behaviour(gen_server).

-include("erllama_cache_log.hrl").

-export([start_link/2, child_spec/2, failure/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-type start() :: {module(), atom(), list()}.

-record(state, {
    id :: atom(),
    start :: start(),
    server :: pid() | undefined,
    failure :: term(),
    %% Monotonic milliseconds.
    since = 0 :: integer(),
    pause = 0 :: non_neg_integer()
}).

%% Milliseconds: the first pause between two tries; the longest after an end, and the longest after
%% a failed start; how long a server has to last for its next end to count as its first.
-define(FIRST_PAUSE, 50).
-define(LONGEST_PAUSE, 500).
-define(LONGEST_PAUSE_FAILED, 30000).
-define(LASTS, 10000).
%% Milliseconds that a server has to shut down, as a supervisor would give it.
-define(SHUTDOWN, 5000).

-spec child_spec(atom(), start()) -> supervisor:child_spec().
child_spec(Id, Start) ->
    %% A moment longer than it waits for its server.
    #{id => Id, start => {?MODULE, start_link, [Id, Start]}, shutdown => ?SHUTDOWN + 1000}.

-spec start_link(atom(), start()) -> {ok, pid()}.
start_link(Id, Start) ->
    gen_server:start_link(?MODULE, {Id, Start}, []).

%% Why the server does not run; `none' when it does.
-spec failure(pid()) -> none | {failed, term()}.
failure(Keeper) ->
    gen_server:call(Keeper, failure, infinity).

init({Id, Start}) ->
    process_flag(trap_exit, true),
    %% A wrong configuration raises here, and so fails the start of the application.
    {ok, try_start(#state{id = Id, start = Start})}.

handle_call(failure, _From, #state{server = undefined, failure = Failure} = State) ->
    {reply, {failed, Failure}, State};
handle_call(failure, _From, State) ->
    {reply, none, State};
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

handle_cast(_Request, State) ->
    {noreply, State}.

handle_info({'EXIT', Pid, Reason}, #state{server = Pid, since = Since} = State) ->
    Pause = case erlang:monotonic_time(millisecond) - Since >= ?LASTS of
        true -> 0;
        false -> min(State#state.pause, ?LONGEST_PAUSE)
    end,
    {noreply, pause(Reason, Pause, longer(Pause), State#state{server = undefined})};
handle_info(try_start, #state{server = undefined} = State) ->
    %% The configuration may have changed since, and be wrong.
    try
        {noreply, try_start(State)}
    catch
        error:Reason -> {noreply, failed(Reason, State)}
    end;
handle_info(_Message, State) ->
    {noreply, State}.

terminate(_Reason, #state{server = undefined}) ->
    ok;
terminate(_Reason, #state{server = Pid}) ->
    Monitor = monitor(process, Pid),
    true = exit(Pid, shutdown),
    receive
        {'DOWN', Monitor, process, Pid, _} -> ok
    after ?SHUTDOWN ->
        true = exit(Pid, kill),
        ok
    end.

try_start(#state{start = {Module, Function, Args}} = State) ->
    case apply(Module, Function, Args) of
        {ok, Pid} ->
            State#state{server = Pid, since = erlang:monotonic_time(millisecond)};
        {error, Reason} ->
            failed(Reason, State)
    end.

failed(Reason, #state{pause = Pause} = State) ->
    Next = min(longer(Pause), ?LONGEST_PAUSE_FAILED),
    pause(Reason, Next, Next, State).

longer(0) -> ?FIRST_PAUSE;
longer(Pause) -> 2 * Pause.

pause(Reason, Pause, Next, #state{id = Id} = State) ->
    ?LOG_ERROR(#{event => server_down, server => Id, reason => Reason, next_try_ms => Pause},
               ?LOG_META),
    _ = erlang:send_after(Pause, self(), try_start),
    State#state{failure = Reason, pause = Next}.

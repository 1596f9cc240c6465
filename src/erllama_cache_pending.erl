%% The saves of this node that nobody waits for: those behind their callers, which were told `{ok,
%% Key}' before there is a file, and the detached ones of save_async.
%%
%% The server bounds how many saves behind their callers there are, and how many bytes they hold. It
%% watches the process that answers for each save, and tells who waits for them that they have
%% ended. Loads look into its table, without asking it, for payloads that are on their way to the
%% disk.
%%
%% It is started by the first save that needs it and belongs to no supervisor: these saves outlive
%% the writer and the host. If it is killed, they go on, and the next save starts another.
%%
%% @private
-module(erllama_cache_pending).
-behaviour(gen_server).

-export([scope/2, find/2, enter/5, enter_detached/1, leave/0, flush/1, info/0, owners/0]).
-export([outlive_application/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).
-export_type([scope/0, bounds/0, info/0]).

-include("erllama_cache_limits.hrl").

%% Where a key is reserved: with erllama as a whole, or with one tier server or store.
-type scope() :: atom().
-type bounds() :: #{max := pos_integer(), max_bytes := pos_integer(), atom() => term()}.
-type info() :: #{pending := non_neg_integer(), pending_bytes := non_neg_integer(),
                  oldest_pending_ms := non_neg_integer()}.

%% A save that is pending.
-record(pending, {
    id :: {scope(), erllama_cache_writer:key()},
    owner :: pid(),
    bytes :: non_neg_integer(),
    %% Monotonic milliseconds.
    since :: integer(),
    info :: erllama_cache_store:file_info(),
    payload :: binary()
}).

-record(state, {
    %% The saves, by the monitors of their owners.
    saves = #{} :: #{reference() => #pending{} | detached},
    monitors = #{} :: #{pid() => reference()},
    count = 0 :: non_neg_integer(),
    bytes = 0 :: non_neg_integer(),
    %% Who waits for the end of which saves.
    waiters = [] :: [{gen_server:from(), Awaited :: #{reference() => awaited}}]
}).

%% The scope of a save's key.
-spec scope(Host :: module(), erllama_cache_host:tier_srv()) -> scope().
scope(erllama_cache_host_erllama = Host, _TierSrv) -> Host;
scope(_Host, TierSrv) -> TierSrv.

%% The state that is being saved under this key, and the process that answers for the save.
-spec find(scope(), erllama_cache_writer:key()) ->
    {ok, erllama_cache_store:file_info(), Payload :: binary(), Owner :: pid()} | none.
find(Scope, Key) ->
    try ets:lookup(?MODULE, {Scope, Key}) of
        [#pending{info = Info, payload = Payload, owner = Owner}] -> {ok, Info, Payload, Owner};
        [] -> none
    catch
        %% There is no table: nothing was ever pending.
        error:badarg -> none
    end.

%% Takes a place for a save that the calling process answers for, until it leaves or ends. `full'
%% and `already_present' take none.
-spec enter(scope(), erllama_cache_writer:key(), erllama_cache_store:file_info(),
            Payload :: binary(), bounds()) ->
    ok | already_present | full.
enter(Scope, Key, Info, Payload, Bounds) ->
    Pending = #pending{
        id = {Scope, Key}, owner = self(), bytes = byte_size(Payload),
        since = erlang:monotonic_time(millisecond), info = Info, payload = Payload
    },
    call({enter, Pending, Bounds}).

%% The same for a save that is not bounded, and that no load can be answered from.
-spec enter_detached(pid()) -> ok.
enter_detached(Owner) ->
    call({enter_detached, Owner}).

%% The save of the calling process has ended: the key can be saved again at once.
-spec leave() -> ok.
leave() ->
    call(leave).

%% Waits until the saves that are pending now have ended, at most so many milliseconds.
-spec flush(timeout()) -> ok | {error, {pending, pos_integer()}}.
flush(Timeout) ->
    case whereis(?MODULE) of
        undefined -> ok;
        Server -> flush(Server, Timeout)
    end.

flush(Server, Timeout) ->
    %% The server answers at the deadline, so that it knows how many are left.
    try
        gen_server:call(Server, {flush, Timeout}, infinity)
    catch
        %% It knows of no save any more, and neither does anybody else.
        exit:_ -> ok
    end.

-spec info() -> info().
info() ->
    Now = erlang:monotonic_time(millisecond),
    fold(
        fun(#pending{bytes = Bytes, since = Since}, #{pending := Count, pending_bytes := Sum,
                                                      oldest_pending_ms := Oldest}) ->
            #{pending => Count + 1, pending_bytes => Sum + Bytes,
              oldest_pending_ms => max(Oldest, Now - Since)}
        end,
        #{pending => 0, pending_bytes => 0, oldest_pending_ms => 0}
    ).

%% The processes that answer for what is pending behind callers.
-spec owners() -> [pid()].
owners() ->
    fold(fun(#pending{owner = Owner}, Owners) -> [Owner | Owners] end, []).

%% Makes the calling process, and those that it spawns, belong to no application. When one has
%% stopped, its master kills all processes whose group leader it is.
-spec outlive_application() -> ok.
outlive_application() ->
    true = group_leader(whereis(init), self()),
    ok.

fold(Fun, Acc) ->
    try
        ets:foldl(Fun, Acc, ?MODULE)
    catch
        error:badarg -> Acc
    end.

%% The server may be started, or be killed, at any moment.
call(Request) ->
    try
        gen_server:call(?MODULE, Request, infinity)
    catch
        exit:{Reason, _} when Reason =:= noproc; Reason =:= killed ->
            _ = gen_server:start({local, ?MODULE}, ?MODULE, [], []),
            call(Request)
    end.

%%% The server

%% @private
init([]) ->
    ok = outlive_application(),
    ?MODULE = ets:new(?MODULE, [
        named_table, protected, {keypos, #pending.id}, {read_concurrency, true}
    ]),
    {ok, #state{}}.

%% @private
handle_call({enter, #pending{id = Id, owner = Owner} = Pending, Bounds}, _From, State) ->
    case is_pending(Id) of
        true ->
            {reply, already_present, State};
        false ->
            Present = forget_dead(Id, State),
            case fits(Pending, Bounds, Present) of
                true -> {reply, ok, watch(Owner, Pending, Present)};
                false -> {reply, full, Present}
            end
    end;
handle_call({enter_detached, Owner}, _From, State) ->
    {reply, ok, watch(Owner, detached, State)};
handle_call(leave, {Owner, _Tag}, #state{monitors = Monitors} = State) ->
    case Monitors of
        #{Owner := Monitor} -> {reply, ok, ended(Monitor, State)};
        _ -> {reply, ok, State}
    end;
handle_call({flush, Timeout}, From, #state{saves = Saves, waiters = Waiters} = State) ->
    case map_size(Saves) of
        0 ->
            {reply, ok, State};
        _ ->
            _ = is_integer(Timeout) andalso erlang:start_timer(Timeout, self(), {flush, From}),
            Awaited = maps:map(fun(_Monitor, _Save) -> awaited end, Saves),
            {noreply, State#state{waiters = [{From, Awaited} | Waiters]}}
    end;
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

%% @private
handle_cast(_Request, State) ->
    {noreply, State}.

%% @private
handle_info({'DOWN', Monitor, process, _Pid, _Reason}, State) ->
    {noreply, ended(Monitor, State)};
handle_info({timeout, _Timer, {flush, From}}, #state{waiters = Waiters} = State) ->
    case lists:keytake(From, 1, Waiters) of
        {value, {From, Awaited}, Others} ->
            gen_server:reply(From, {error, {pending, map_size(Awaited)}}),
            {noreply, State#state{waiters = Others}};
        false ->
            {noreply, State}
    end;
handle_info(_Message, State) ->
    {noreply, State}.

%% The end of an owner that was killed may not have been noticed yet.
is_pending(Id) ->
    case ets:lookup(?MODULE, Id) of
        [#pending{owner = Owner}] -> is_process_alive(Owner);
        [] -> false
    end.

forget_dead(Id, #state{monitors = Monitors} = State) ->
    case ets:lookup(?MODULE, Id) of
        [#pending{owner = Owner}] -> ended(map_get(Owner, Monitors), State);
        [] -> State
    end.

fits(#pending{bytes = Bytes}, #{max := Max, max_bytes := MaxBytes},
     #state{count = Count, bytes = Held}) ->
    Count < Max andalso Held + Bytes =< MaxBytes.

watch(Owner, Save, #state{saves = Saves, monitors = Monitors} = State) ->
    Monitor = monitor(process, Owner),
    taken(Save, State#state{
        saves = Saves#{Monitor => Save}, monitors = Monitors#{Owner => Monitor}
    }).

taken(detached, State) ->
    State;
taken(#pending{bytes = Bytes} = Pending, #state{count = Count, bytes = Held} = State) ->
    true = ets:insert(?MODULE, Pending),
    State#state{count = Count + 1, bytes = Held + Bytes}.

%% A save has ended, or its owner has.
ended(Monitor, #state{saves = Saves, monitors = Monitors, waiters = Waiters} = State) ->
    true = demonitor(Monitor, [flush]),
    case maps:take(Monitor, Saves) of
        {Save, Others} ->
            Freed = freed(Save, State),
            Freed#state{
                saves = Others,
                monitors = maps:filter(fun(_Owner, Each) -> Each =/= Monitor end, Monitors),
                waiters = lists:filtermap(fun(Waiter) -> awaits(Monitor, Waiter) end, Waiters)
            };
        error ->
            State
    end.

freed(detached, State) ->
    State;
freed(#pending{id = Id, bytes = Bytes}, #state{count = Count, bytes = Held} = State) ->
    true = ets:delete(?MODULE, Id),
    State#state{count = Count - 1, bytes = Held - Bytes}.

%% What one who waits still waits for, now that this save has ended.
awaits(Monitor, {From, Awaited}) ->
    case maps:remove(Monitor, Awaited) of
        Others when map_size(Others) =:= 0 ->
            gen_server:reply(From, ok),
            false;
        Others ->
            {true, {From, Others}}
    end.

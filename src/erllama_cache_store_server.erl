%% A store's server: it looks through the root at the start, watches over reservations whose owners
%% may die, and in a bounded store makes room. What loads and saves do themselves is in
%% erllama_cache_store.
%%
%% @private
-module(erllama_cache_store_server).
-behaviour(gen_server).

-include("erllama_cache_index.hrl").
-include("erllama_cache_log.hrl").
-include("erllama_cache_store.hrl").

-export([start_link/3]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

%% A reservation that the server watches over: until its owner says that it is over, or dies. Its
%% room is taken until then, whatever has become of its row.
-record(watch, {key :: erllama_cache_nif:key(), monitor :: reference(), size :: non_neg_integer()}).

-record(state, {
    config :: #config{},
    watches = #{} :: #{reference() => #watch{}},
    %% Which reservation a monitor belongs to.
    monitors = #{} :: #{reference() => reference()},
    %% In a bounded store: bytes of all that is watched, and of all files whose tokens are not
    %% watched. In such a store the server alone makes rows and removes them, but for a
    %% reservation's owner, who makes it a file or gives it up and then tells of it, or dies.
    used = 0 :: non_neg_integer(),
    %% The least recently used keys with the time of their last use, as of the last look: a key that
    %% was used since then is skipped.
    oldest = [] :: [{LastUsed :: integer(), erllama_cache_nif:key()}]
}).

-spec start_link(erllama_cache_store:name(), erllama_cache_nif:root(), Options :: map()) ->
    {ok, pid()} | {error, term()}.
start_link(Name, Path, Options) ->
    gen_server:start_link({local, Name}, ?MODULE, {Name, Path, Options}, []).

%% @private
init({Name, Path, Options}) ->
    case erllama_cache_secret:read(maps:get(mac_key, Options, undefined)) of
        {ok, Secret} -> open(Name, Path, Options, Secret);
        {error, Reason} -> {stop, Reason}
    end.

open(Name, Path, #{root := Root, tier := Tier, max_bytes := MaxBytes}, Secret) ->
    ok = erllama_cache_turn:setup(),
    ok = erllama_cache_metrics:setup(),
    Config = #config{
        name = Name, server = self(), path = Path, root = Root, tier = Tier, max_bytes = MaxBytes,
        secret = Secret, counters = counters:new(length(?COUNTERS), [write_concurrency]),
        generation = atomics:new(1, [])
    },
    case erllama_cache_index:new(Name, Config) of
        ok -> look_through(#state{config = Config});
        error -> {stop, {name_taken, Name}}
    end.

look_through(#state{config = #config{name = Name} = Config} = State) ->
    Begun = erlang:monotonic_time(millisecond),
    case scan(removes, State) of
        {ok, Scanned} ->
            Took = erlang:monotonic_time(millisecond) - Begun,
            start_scanned(try_root(Config), Took, Scanned);
        {error, Reason} ->
            %% The starter hears of it before this process is gone, and may try again at once.
            ok = erllama_cache_index:delete(Name),
            {stop, Reason}
    end.

%% Whether anything can be saved here at all. An error that may pass is told by the first save that
%% meets it.
try_root(#config{path = Path}) ->
    erllama_cache_turn:run(fun(Turn) -> erllama_cache_nif:takes_unnamed(Turn, Path) end).

start_scanned({error, no_links}, _Took, #state{config = #config{name = Name}}) ->
    ok = erllama_cache_index:delete(Name),
    {stop, no_links};
start_scanned(TakesUnnamed, Took, #state{config = Config} = State) ->
    report_start(Config, TakesUnnamed, Took),
    {_, Roomy} = make_room(0, State),
    {ok, Roomy}.

%% Adds what the root has to the index. Others save and load meanwhile: what they know is newer.
scan(Removes, #state{config = Config} = State) ->
    #config{path = Path, secret = Secret, generation = Generation} = Config,
    Begin = fun(Turn) ->
        erllama_cache_nif:scan(Turn, Path, Secret =/= none, Removes =:= removes)
    end,
    case erllama_cache_turn:run(Begin) of
        {ok, Scan} ->
            ok = atomics:put(Generation, 1, erllama_cache_nif:root_generation(Path)),
            scan_slices(Scan, State);
        {error, _} = Error ->
            Error
    end.

scan_slices(Scan, #state{config = Config} = State) ->
    case erllama_cache_turn:run(fun(Turn) -> erllama_cache_nif:scan_more(Turn, Scan) end) of
        {Progress, Found} when is_list(Found) ->
            ok = lists:foreach(fun(Other) -> report(Other, Config) end, Found),
            Added = lists:foldl(fun add_found/2, State, Found),
            case Progress of
                more -> scan_slices(Scan, Added);
                ok -> {ok, Added}
            end;
        {error, _} = Error ->
            Error
    end.

add_found({file, Key, Size, LastUsed}, State) ->
    add(erllama_cache_index:file(Key, Size, LastUsed * 1000, make_ref()), State);
%% What no load takes has its room, too, and goes when room is wanted.
add_found({skipped, <<_:256>> = Key, Size, Modified, _Reason}, State) when Size > 0 ->
    add(erllama_cache_index:refused_file(Key, Size, Modified * 1000, make_ref()), State);
add_found(_Other, State) ->
    State.

add(#row{size = Size} = Row, #state{config = #config{name = Name}, used = Used} = State) ->
    case erllama_cache_index:add(Name, Row) of
        true -> State#state{used = Used + Size};
        false -> State
    end.

report_start(#config{name = Name, root = Root}, TakesUnnamed, Took) ->
    {Files, Bytes, _Reservations} = erllama_cache_index:count(Name),
    ?LOG_INFO(#{event => store_scanned, store => Name, root => Root, files => Files, bytes => Bytes,
                ms => Took}, ?LOG_META),
    case TakesUnnamed of
        false -> ?LOG_NOTICE(#{event => root_needs_names, store => Name, root => Root}, ?LOG_META);
        _ -> ok
    end.

report({file, _Key, _Size, _LastUsed}, _Config) ->
    ok;
report(swept, _Config) ->
    ok;
report({removed, Key, Reason}, #config{name = Name, root = Root}) ->
    ?LOG_WARNING(#{
        event => corrupt_file_removed, store => Name, reason => Reason,
        file => erllama_cache_path:final(Root, Key)
    }, ?LOG_META);
report({skipped, Key, _Size, _Modified, Reason}, #config{name = Name, root = Root}) ->
    File = case Key of
        undefined -> temporary_file;
        _ -> erllama_cache_path:final(Root, Key)
    end,
    ?LOG_WARNING(#{event => file_skipped, store => Name, reason => Reason, file => File},
                 ?LOG_META).

%% @private
handle_call({admit, Row}, _From, State) ->
    {Reply, Next} = admit(Row, State),
    {reply, Reply, Next};
handle_call(audit, _From, State) ->
    {reply, books(State), State};
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

%% @private
handle_cast({done, Token}, State) ->
    {noreply, unwatch(Token, State)};
handle_cast({found, Key, Size, LastUsed}, State) ->
    {noreply, add(erllama_cache_index:file(Key, Size, LastUsed, make_ref()), State)};
handle_cast({gone, Row}, #state{config = #config{name = Name}} = State) ->
    case erllama_cache_index:remove(Name, Row) of
        true -> {noreply, left(Row, State)};
        false -> {noreply, State}
    end;
handle_cast({checked, Token, Key, {ok, Size, LastUsed}}, #state{config = Config} = State) ->
    File = erllama_cache_index:file(Key, Size, LastUsed * 1000, Token),
    _ = erllama_cache_index:settle(Config#config.name, Token, File),
    {noreply, unwatch(Token, State)};
handle_cast({checked, Token, Key, _NotThere}, #state{config = Config} = State) ->
    _ = erllama_cache_index:remove(
        Config#config.name, #row{key = Key, token = Token, state = reserved}
    ),
    {noreply, unwatch(Token, State)};
handle_cast(look_again, State) ->
    {noreply, look_again(State)}.

%% @private
handle_info({timeout, Token, {watch, Key, Size, Pid}}, #state{config = Config} = State) ->
    %% The timer may have gone off just as the save ended, and this come after its `done'.
    case erllama_cache_index:row(Config#config.name, Key) of
        #row{token = Token, state = reserved} -> {noreply, watch(Token, Key, Size, Pid, State)};
        _ -> {noreply, State}
    end;
handle_info({'DOWN', Monitor, process, _Pid, _Reason}, #state{monitors = Monitors} = State) ->
    case Monitors of
        #{Monitor := Token} -> {noreply, owner_died(Token, State)};
        _ -> {noreply, State}
    end;
handle_info(_Message, State) ->
    {noreply, State}.

admit(#row{key = Key, size = Size} = Row, State) ->
    #state{config = #config{name = Name, max_bytes = MaxBytes}} = State,
    case Size =< MaxBytes andalso erllama_cache_index:claimable(Name, Key) of
        false ->
            {{error, exceeds_max_bytes}, State};
        {error, _} = Error ->
            {Error, State};
        {ok, Old} ->
            case fits_beside_reservations(Size, Old, State) of
                true -> admit(Row, Old, State);
                false -> {{error, no_room}, State}
            end
    end.

%% What is reserved cannot be evicted: where that leaves too little room, no file goes in vain.
fits_beside_reservations(Size, Old, #state{config = Config, watches = Watches}) ->
    #config{name = Name, max_bytes = MaxBytes} = Config,
    Others = case Old of
        none -> Watches;
        #row{token = Going} -> maps:remove(Going, Watches)
    end,
    Reserved = [
        Watched
     || {Token, #watch{key = Key, size = Watched}} <- maps:to_list(Others),
        is_reserved(Token, erllama_cache_index:row(Name, Key))
    ],
    Size + lists:sum(Reserved) =< MaxBytes.

is_reserved(Token, #row{token = Token, state = reserved}) -> true;
is_reserved(_Token, _Row) -> false.

admit(#row{key = Key, size = Size, token = Token, pid = Pid} = Row, Old, State) ->
    #state{config = #config{name = Name}} = State,
    %% A file that is not there any more, or that is to be replaced, has its room no longer.
    case make_room(Size - room_of(Old, State), State) of
        {ok, Roomy} ->
            case erllama_cache_index:claim(Name, Old, Row) of
                true -> {{ok, Token}, watch(Token, Key, Size, Pid, left(Old, Roomy))};
                %% It was evicted to make room, or a load has refused it since.
                false -> admit(Row, Roomy)
            end;
        {{error, _} = Error, Tried} ->
            {Error, Tried}
    end.

%% What a row's going would free.
room_of(none, _State) -> 0;
room_of(#row{token = Token, size = Size, state = RowState}, #state{watches = Watches}) ->
    case Watches of
        #{Token := #watch{size = Watched}} -> Watched;
        #{} when RowState =:= reserved -> 0;
        #{} -> Size
    end.

%% A row has left the index, or has made way for another: its room is free.
left(none, State) ->
    State;
left(#row{token = Token} = Row, #state{watches = Watches, used = Used} = State) ->
    case Watches of
        #{Token := _} -> forget(Token, State);
        #{} -> State#state{used = Used - room_of(Row, State)}
    end.

watch(Token, Key, Size, Pid, State) ->
    #state{watches = Watches, monitors = Monitors, used = Used} = State,
    Monitor = monitor(process, Pid),
    State#state{
        watches = Watches#{Token => #watch{key = Key, monitor = Monitor, size = Size}},
        monitors = Monitors#{Monitor => Token},
        used = Used + Size
    }.

%% The reservation is over: what it has become, if anything, has its own room now.
unwatch(Token, #state{watches = Watches, config = #config{name = Name}} = State) ->
    case Watches of
        #{Token := #watch{key = Key}} ->
            #state{used = Used} = Forgotten = forget(Token, State),
            case erllama_cache_index:row(Name, Key) of
                #row{token = Token, state = FileState, size = Size} when FileState =/= reserved ->
                    Forgotten#state{used = Used + Size};
                _ ->
                    Forgotten
            end;
        #{} ->
            State
    end.

forget(Token, #state{watches = Watches, monitors = Monitors, used = Used} = State) ->
    {#watch{monitor = Monitor, size = Size}, Rest} = maps:take(Token, Watches),
    true = demonitor(Monitor, [flush]),
    State#state{
        watches = Rest, monitors = maps:remove(Monitor, Monitors), used = Used - Size
    }.

%% Its owner died in the middle of a save. If it had published the file by then, the file is looked
%% at and taken if it is good.
owner_died(Token, #state{config = #config{name = Name} = Config, watches = Watches} = State) ->
    #{Token := #watch{key = Key}} = Watches,
    case erllama_cache_index:row(Name, Key) of
        #row{token = Token, state = reserved} ->
            Server = self(),
            %% Not linked: should the look fail, the reservation's lease ends, and that is all.
            _ = spawn(fun() ->
                gen_server:cast(Server, {checked, Token, Key, check_file(Config, Key)})
            end),
            State;
        %% It had announced the file, or somebody else has the key by now.
        _ ->
            unwatch(Token, State)
    end.

check_file(#config{path = Path, secret = Secret}, Key) ->
    Begin = fun(Turn) -> erllama_cache_nif:check(Turn, Path, Key, Secret) end,
    erllama_cache_turn:run_slices(Begin, fun erllama_cache_nif:check_more/2).

%% The root's path leads to another directory than the index is of. What is being saved is being
%% saved there, or has been saved here.
look_again(#state{config = #config{name = Name, path = Path, root = Root} = Config} = State) ->
    #config{generation = Generation} = Config,
    case erllama_cache_nif:root_generation(Path) =:= atomics:get(Generation, 1) of
        true ->
            %% Several have noticed it.
            State;
        false ->
            ?LOG_WARNING(#{event => root_changed, store => Name, root => Root}, ?LOG_META),
            ok = erllama_cache_index:clear(Name),
            Watched = lists:sum([Size || #watch{size = Size} <- maps:values(State#state.watches)]),
            %% Nobody has said that what is here now may be removed.
            case scan(removes_nothing, State#state{used = Watched, oldest = []}) of
                {ok, Scanned} ->
                    {_, Roomy} = make_room(0, Scanned),
                    Roomy;
                {error, Reason} ->
                    ?LOG_WARNING(#{event => root_unreadable, store => Name, root => Root,
                                   reason => Reason}, ?LOG_META),
                    State#state{used = Watched, oldest = []}
            end
    end.

%% For tests: what the store counts as used, and what it should; equal at any time in a bounded
%% store.
books(#state{config = #config{name = Name}, watches = Watches, used = Used}) ->
    Files = maps:without(maps:keys(Watches), erllama_cache_index:sizes(Name)),
    Watched = [Size || #watch{size = Size} <- maps:values(Watches)],
    #{
        used => Used,
        should => lists:sum(maps:values(Files)) + lists:sum(Watched),
        watches => map_size(Watches)
    }.

%%% Eviction

%% At least so many of the least recently used are remembered from one look at all of them.
-define(LOOK, 1000).

make_room(_Needed, #state{config = #config{max_bytes = infinity}} = State) ->
    {ok, State};
make_room(Needed, State) ->
    make_room(Needed, State, 1).

%% `Evicted' counts since the last look: a look at which nothing could be evicted was the last.
make_room(Needed, #state{used = Used, config = #config{max_bytes = Max}} = State, _Evicted) when
    Used + Needed =< Max
->
    {ok, State};
make_room(_Needed, #state{oldest = []} = State, 0) ->
    {{error, no_room}, State};
make_room(Needed, #state{oldest = [], config = #config{name = Name}} = State, _Evicted) ->
    make_room(Needed, State#state{oldest = erllama_cache_index:oldest(Name, ?LOOK)}, 0);
make_room(Needed, #state{oldest = [{LastUsed, Key} | Rest], config = Config} = State, Evicted) ->
    Next = State#state{oldest = Rest},
    case erllama_cache_index:row(Config#config.name, Key) of
        #row{state = RowState, last_used = LastUsed} = Row when RowState =/= reserved ->
            case evict(Row, Config) of
                evicted -> make_room(Needed, left(Row, Next), Evicted + 1);
                kept -> make_room(Needed, Next, Evicted);
                %% No other file could be evicted either.
                {error, _} = Error -> {Error, Next}
            end;
        _UsedSince ->
            make_room(Needed, Next, Evicted)
    end.

evict(#row{key = Key, size = Size} = Row, Config) ->
    #config{name = Name, path = Path, counters = Counters} = Config,
    case erllama_cache_turn:run(fun(Turn) -> erllama_cache_nif:delete(Turn, Path, Key) end) of
        Existed when is_boolean(Existed) ->
            case erllama_cache_index:remove(Name, Row) of
                true ->
                    ok = counters:add(Counters, ?EVICTIONS, 1),
                    evicted;
                false ->
                    kept
            end;
        {error, Reason} ->
            report({skipped, Key, Size, 0, Reason}, Config),
            case is_of_one_file(Reason) of
                true -> kept;
                false -> {error, Reason}
            end
    end.

%% What forbids to remove this file, as against what is wrong with the whole root.
is_of_one_file(eperm) -> true;
is_of_one_file(eisdir) -> true;
is_of_one_file(ebusy) -> true;
is_of_one_file(etxtbsy) -> true;
is_of_one_file(_) -> false.

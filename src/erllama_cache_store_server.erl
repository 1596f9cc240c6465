%% A store's server: it scans the root at the start, watches reservations, whose owners may die, and
%% makes room in a bounded store. What loads and saves do themselves is in erllama_cache_store.
%%
%% @private
-module(erllama_cache_store_server).
-behaviour(gen_server).

-include("erllama_cache_index.hrl").
-include("erllama_cache_store.hrl").

-export([start_link/3]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

%% A reservation that the server watches until its owner ends it, or dies. It takes its room until
%% then, whatever its row has become.
-record(watch, {key :: erllama_cache_nif:key(), monitor :: reference(), size :: non_neg_integer()}).

%% Milliseconds between two looks for files that have expired.
-define(SOONEST, 100).
-define(LATEST, 60000).
-define(DAY, 86400000).

-record(state, {
    config :: #config{},
    %% Whether the last scan has seen files that were put aside.
    has_rejected = false :: boolean(),
    watches = #{} :: #{reference() => #watch{}},
    %% Which reservation a monitor belongs to.
    monitors = #{} :: #{reference() => reference()},
    %% In a bounded store: bytes of all watches, and of all files whose tokens are not watched. In
    %% such a store the server alone adds and removes rows. The exception is a reservation's owner,
    %% which settles or cancels its row and then says so, or dies.
    used = 0 :: non_neg_integer(),
    %% What to evict next.
    eviction = erllama_cache_evict:new() :: erllama_cache_evict:order()
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

open(Name, Path, Options, Secret) ->
    #{root := Root, tier := Tier, max_bytes := MaxBytes, min_free_bytes := MinFree,
      keyed_by := KeyedBy, eviction := Eviction, half_life := HalfLife, ttl := Ttl} = Options,
    ok = erllama_cache_io_limit:setup(),
    ok = erllama_cache_lend:setup(),
    ok = erllama_cache_counts:setup(),
    Config = #config{
        name = Name, server = self(), path = Path, root = Root, tier = Tier, max_bytes = MaxBytes,
        min_free_bytes = MinFree, bounded = MaxBytes =/= infinity orelse MinFree > 0, ttl = Ttl,
        eviction = case Eviction of lru -> lru; frecency -> {frecency, HalfLife} end,
        keyed_by = KeyedBy, secret = Secret, generation = atomics:new(1, []),
        borrower = erllama_cache_peer_group:borrower(Options, #borrower{
            host = erllama_cache_store, name = Name, tier = Tier, root = Root, path = Path,
            secret = Secret
        }),
        counters = counters:new(length(?COUNTERS), [write_concurrency])
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
            %% The caller learns of it before this process is gone, and may try again at once.
            ok = erllama_cache_index:delete(Name),
            {stop, Reason}
    end.

%% Whether anything can be saved here at all. A transient error is left to the first save that meets
%% it.
try_root(#config{path = Path}) ->
    erllama_cache_io_limit:run(fun(Turn) -> erllama_cache_nif:takes_unnamed(Turn, Path) end).

start_scanned({error, no_links}, _Took, #state{config = #config{name = Name}}) ->
    ok = erllama_cache_index:delete(Name),
    {stop, no_links};
start_scanned(TakesUnnamed, Took, #state{config = Config} = State) ->
    ok = erllama_cache_store_log:started(Config, TakesUnnamed, Took),
    {_, Roomy} = make_room(0, 0, State),
    ok = erllama_cache_peer_group:join(Config#config.borrower),
    ok = look_for_expired_later(Config),
    ok = forget_rejected(Roomy),
    {ok, Roomy}.

%% Now, and each day; if there are any, for a list of all names takes as much memory as all rows.
forget_rejected(#state{config = #config{counters = Counters} = Config, has_rejected = Has}) ->
    _ = erlang:send_after(?DAY, self(), forget_rejected),
    case Has orelse counters:get(Counters, ?REJECTED) > 0 of
        true -> erllama_cache_store_reject:forget_old(Config);
        false -> ok
    end.

%% Files are removed at most a tenth of `ttl' late, or a minute.
look_for_expired_later(#config{ttl = infinity}) ->
    ok;
look_for_expired_later(#config{ttl = Ttl}) ->
    _ = erlang:send_after(max(?SOONEST, min(?LATEST, Ttl div 10)), self(), look_for_expired),
    ok.

%% Adds the root's files to the index. A row that a save or a load has added meanwhile is newer.
scan(Removes, #state{config = Config} = State) ->
    #config{path = Path, secret = Secret, generation = Generation} = Config,
    Begin = fun(Turn) ->
        erllama_cache_nif:scan(Turn, Path, Secret =/= none, Removes =:= removes)
    end,
    case erllama_cache_io_limit:run(Begin) of
        {ok, Scan} ->
            ok = atomics:put(Generation, 1, erllama_cache_nif:root_generation(Path)),
            scan_slices(Scan, State);
        {error, _} = Error ->
            Error
    end.

scan_slices(Scan, #state{config = Config} = State) ->
    case erllama_cache_io_limit:run(fun(Turn) -> erllama_cache_nif:scan_more(Turn, Scan) end) of
        {Progress, Found} when is_list(Found) ->
            ok = lists:foreach(fun(Each) -> erllama_cache_store_log:found(Config, Each) end, Found),
            Added = lists:foldl(fun add_found/2, State, Found),
            case Progress of
                more -> scan_slices(Scan, Added);
                ok -> {ok, Added}
            end;
        {error, _} = Error ->
            Error
    end.

add_found({file, Key, Length, Size, LastUsed, Hits}, #state{config = Config} = State) ->
    File = erllama_cache_index:file(Key, Length, Size, LastUsed * 1000, make_ref()),
    add(erllama_cache_evict:with_hits(Config#config.eviction, Hits, File), State);
%% A file that no load accepts takes room, too, and is evicted like others.
add_found({skipped, <<_:256>> = Key, Size, Modified, _Reason}, State) when Size > 0 ->
    add(erllama_cache_index:refused_file(Key, Size, Modified * 1000, make_ref()), State);
add_found(rejected, State) ->
    State#state{has_rejected = true};
add_found(_Other, State) ->
    State.

add(#row{size = Size} = Row, #state{config = #config{name = Name}, used = Used} = State) ->
    case erllama_cache_index:add(Name, Row) of
        true -> State#state{used = Used + Size};
        false -> State
    end.

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
handle_cast({found, Key, Length, Size, LastUsed}, State) ->
    {noreply, add(erllama_cache_index:file(Key, Length, Size, LastUsed, make_ref()), State)};
handle_cast({gone, Row}, #state{config = #config{name = Name}} = State) ->
    case erllama_cache_index:remove(Name, Row) of
        true -> {noreply, left(Row, State)};
        false -> {noreply, State}
    end;
handle_cast({checked, Token, Key, {ok, Length, Size, LastUsed}}, #state{config = Config} = State) ->
    File = erllama_cache_index:file(Key, Length, Size, LastUsed * 1000, Token),
    _ = erllama_cache_index:settle(Config#config.name, Token, File),
    {noreply, unwatch(Token, State)};
handle_cast({checked, Token, Key, _NotThere}, #state{config = Config} = State) ->
    _ = erllama_cache_index:remove(
        Config#config.name, #row{key = Key, token = Token, state = reserved}
    ),
    {noreply, unwatch(Token, State)};
handle_cast(unpinned, State) ->
    %% The last look has left it out.
    {noreply, State#state{eviction = erllama_cache_evict:new()}};
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
handle_info(look_for_expired, #state{config = Config} = State) ->
    {noreply, expire(erllama_cache_evict:overdue(Config), State)};
handle_info({look_for_expired, Keys}, State) ->
    {noreply, expire(Keys, State)};
handle_info(forget_rejected, State) ->
    ok = forget_rejected(State),
    {noreply, State};
handle_info(_Message, State) ->
    {noreply, State}.

%% Some at a time: others are served in between. If the root is another directory by now, the keys
%% say nothing of its files.
expire(Keys, #state{config = #config{path = Path} = Config} = State) ->
    %% Opened anew, it shows which directory it is.
    Open = fun(Turn) -> erllama_cache_nif:exists(Turn, Path, <<0:256>>) end,
    _ = erllama_cache_io_limit:run(Open),
    Seen = look_again(State),
    case erllama_cache_evict:expire(Config, Keys) of
        {Removed, []} ->
            ok = look_for_expired_later(Config),
            lists:foldl(fun left/2, Seen, Removed);
        {Removed, Others} ->
            self() ! {look_for_expired, Others},
            lists:foldl(fun left/2, Seen, Removed)
    end.

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

%% Reservations cannot be evicted. If they leave too little room, no file is evicted in vain.
fits_beside_reservations(Size, Old, #state{config = Config, watches = Watches}) ->
    #config{name = Name, max_bytes = MaxBytes} = Config,
    Others = case Old of
        none -> Watches;
        #row{token = Going} -> maps:remove(Going, Watches)
    end,
    Size + reserved_bytes(Name, Others) =< MaxBytes.

reserved_bytes(Name, Watches) ->
    lists:sum([
        Watched
     || {Token, #watch{key = Key, size = Watched}} <- maps:to_list(Watches),
        is_reserved(Token, erllama_cache_index:row(Name, Key))
    ]).

is_reserved(Token, #row{token = Token, state = reserved}) -> true;
is_reserved(_Token, _Row) -> false.

admit(#row{key = Key, size = Size, token = Token, pid = Pid} = Row, Old, State) ->
    #state{config = #config{name = Name}} = State,
    %% A file that is gone, or that is to be replaced, takes no room.
    case make_room(Size - room_of(Old, State), Size, State) of
        {ok, Roomy} ->
            case erllama_cache_index:claim(Name, Old, Row) of
                true -> {{ok, Token}, watch(Token, Key, Size, Pid, left(Old, Roomy))};
                %% The old row was evicted to make room, or a load has refused its file since.
                false -> admit(Row, Roomy)
            end;
        {{error, _} = Error, Tried} ->
            {Error, Tried}
    end.

%% How many bytes a row's removal would free.
room_of(none, _State) -> 0;
room_of(#row{token = Token, size = Size, state = RowState}, #state{watches = Watches}) ->
    case Watches of
        #{Token := #watch{size = Watched}} -> Watched;
        #{} when RowState =:= reserved -> 0;
        #{} -> Size
    end.

%% A row has left the index, or was replaced: its room is free.
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

%% The reservation is over. The file that it has become, if any, takes its own room now.
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

%% The owner died during a save. If it had published the file, the file is checked, and becomes the
%% key's if it is good.
owner_died(Token, #state{config = #config{name = Name} = Config, watches = Watches} = State) ->
    #{Token := #watch{key = Key}} = Watches,
    case erllama_cache_index:row(Name, Key) of
        #row{token = Token, state = reserved} ->
            Server = self(),
            %% Not linked: if the check crashes, the reservation's lease ends, and that is all.
            _ = spawn(fun() ->
                gen_server:cast(Server, {checked, Token, Key, check_file(Config, Key)})
            end),
            State;
        %% It had announced the file, or another process has the key by now.
        _ ->
            unwatch(Token, State)
    end.

check_file(#config{path = Path, secret = Secret}, Key) ->
    Begin = fun(Turn) -> erllama_cache_nif:check(Turn, Path, Key, Secret) end,
    erllama_cache_io_limit:run_slices(Begin, fun erllama_cache_nif:check_more/2).

%% The root's path leads to another directory than the index describes. Running saves publish in the
%% new one.
look_again(#state{config = #config{name = Name, path = Path} = Config} = State) ->
    #config{generation = Generation} = Config,
    case erllama_cache_nif:root_generation(Path) =:= atomics:get(Generation, 1) of
        true ->
            %% Another load or save has noticed it first.
            State;
        false ->
            ok = erllama_cache_store_log:root_changed(Config),
            ok = erllama_cache_index:clear(Name),
            Watched = lists:sum([Size || #watch{size = Size} <- maps:values(State#state.watches)]),
            Empty = State#state{used = Watched, eviction = erllama_cache_evict:new()},
            %% No operator has named this directory as a root, so nothing in it may be removed.
            case scan(removes_nothing, Empty) of
                {ok, Scanned} ->
                    {_, Roomy} = make_room(0, 0, Scanned),
                    Roomy;
                {error, Reason} ->
                    ok = erllama_cache_store_log:root_unreadable(Config, Reason),
                    Empty
            end
    end.

%% For tests: the bytes that the store counts as used, and the bytes that it should count, which are
%% always equal in a bounded store; how many files of each length it counts, and should count, which
%% are equal when nothing changes.
books(#state{config = #config{name = Name}, watches = Watches, used = Used}) ->
    Files = maps:without(maps:keys(Watches), erllama_cache_index:sizes(Name)),
    Watched = [Size || #watch{size = Size} <- maps:values(Watches)],
    #{
        used => Used,
        should => lists:sum(maps:values(Files)) + lists:sum(Watched),
        lengths => erllama_cache_index:length_counts(Name),
        should_lengths => erllama_cache_index:fold(Name, fun count_length/2, #{}),
        watches => map_size(Watches)
    }.

count_length(#row{state = present, length = Length}, Counts) ->
    maps:update_with(Length, fun(Count) -> Count + 1 end, 1, Counts);
count_length(_NoFileToLoad, Counts) ->
    Counts.

%% So much more may be used then, and the file system gives so much: a file that is to be replaced
%% keeps its bytes there until it is.
make_room(_More, _Size, #state{config = #config{bounded = false}} = State) ->
    {ok, State};
make_room(More, Size, State) ->
    Spare = spare_bytes(State),
    case Size =< Spare orelse Size =< spared(Spare, evictable_bytes(State)) of
        true ->
            {Result, #state{eviction = Order} = Roomy} = evict_for(More, Size, Spare, State),
            {Result, Roomy#state{eviction = erllama_cache_evict:until_next(Order)}};
        %% Nothing is evicted in vain, because somebody else has filled the disk.
        false ->
            {{error, no_room}, State}
    end.

%% `Spare' is what the file system has beyond what is to stay free. It is asked once: a file that
%% somebody still reads gives its bytes back when that has ended.
evict_for(More, Size, Spare, #state{used = Used, config = #config{max_bytes = Max}} = State) when
    Used + More =< Max, Size =< Spare
->
    {ok, State};
evict_for(More, Size, Spare, #state{config = Config, eviction = Order} = State) ->
    case erllama_cache_evict:next(Config, Order) of
        {#row{size = Freed} = Evicted, Rest} ->
            Left = left(Evicted, State#state{eviction = Rest}),
            evict_for(More, Size, spared(Spare, Freed), Left);
        {{error, _} = Error, Rest} ->
            {Error, State#state{eviction = Rest}}
    end.

%% Not by a look at all rows: a disk that is as full as it may be is asked about at each save.
evictable_bytes(#state{config = #config{name = Name}, watches = Watches, used = Used}) ->
    Pinned = lists:sum([
        Size
     || Key <- erllama_cache_index:pinned(Name),
        #row{state = State, size = Size} <- [erllama_cache_index:row(Name, Key)],
        State =/= reserved
    ]),
    Used - Pinned - reserved_bytes(Name, Watches).

spared(unknown, _Size) -> unknown;
spared(Spare, Size) -> Spare + Size.

%% An atom, which is more than any number, where nothing is to stay free or nobody knows what is.
%% Running saves have not taken all of their room yet; of what they have taken, some counts twice.
spare_bytes(#state{config = #config{min_free_bytes = 0}}) ->
    unknown;
spare_bytes(#state{config = Config, watches = Watches}) ->
    #config{name = Name, path = Path, min_free_bytes = MinFree} = Config,
    case erllama_cache_io_limit:run(fun(Turn) -> erllama_cache_nif:free_bytes(Turn, Path) end) of
        Free when is_integer(Free) -> Free - MinFree - reserved_bytes(Name, Watches);
        %% The save that asks for room meets the same error.
        {error, _} -> unknown
    end.

%% The built-in store against a model of it: processes save, are stopped at each point of a save and
%% go on or die there; leases end; files are loaded, deleted, damaged, put and removed behind the
%% store's back; the longest stored prefix is looked for; the store is suspended, stopped, killed
%% and started again, in any order. After each step the disk, the index and the books of the store
%% are what the model says. The store is keyed by tokens or by text.
%%
%% Nothing here waits for a time to pass. A lease ends when a step says so. In an unbounded store a
%% timer tells the server of a reservation: a saver that is to be stopped hands its timer to the
%% driver, and it goes off when a step says so, which may be long after the save has ended. Last
%% uses are compared by the millisecond, so each step that uses a file has one of its own.
-module(prop_store_tests).
-behaviour(proper_statem).

%% Before eunit.hrl, which leaves alone what this has defined.
-include_lib("proper/include/proper.hrl").
-include_lib("eunit/include/eunit.hrl").
-include_lib("kernel/include/file.hrl").
-include("erllama_cache_index.hrl").

-export([prop_store/0]).
-export([initial_state/0, command/1, precondition/2, next_state/3, postcondition/3]).
%% The steps.
-export([save/3, save_no_type/1, begin_save/5, go_on/1, die/1, fire/1, end_lease/1]).
-export([renew_beside_loads/1, load/1, longest_prefix/1, delete/1]).
-export([damage/3, remove_file/1, put_file/3]).
-export([start/1, start_slowly/1, started/1, lose/1, lose_under_load/2, suspend/0, resume/0]).

-import(erllama_cache_hooked_host, [with_hook/2, all_turns/0, taken/1, waits_for_a_turn/1]).
-import(erllama_cache_statem_util, [machine_test/5, property/3, step/1, matches/3]).
-import(erllama_cache_test_util, [
    eventually/2, own_messages/0, silence/0, temporary_dir/1, unsilence/1, kill/1,
    next_millisecond/0
]).

-define(WRITER, erllama_cache_writer).
-define(STORE, prop_store).
%% Other stores, each in a root of its own, make the files that appear behind the store's back.
-define(ELSEWHERE, [{tokens, prop_store_elsewhere}, {text, prop_store_elsewhere_by_text}]).
-define(SEQUENCES, 250).
%% Steps of a sequence, at most.
-define(LONGEST, 100).
-define(CLIENTS, [a, b, c]).
%% The prompt of each is a prefix of the next one's.
-define(KEYS, [1, 2, 3, 4, 5, 6]).
%% A prompt has so many bytes for each number up to its key's: a token, or as much text.
-define(UNIT, 4).
%% What a file has beside its payload.
-define(OVERHEAD, 248).
%% What is left of a file that was cut: less than its fields of fixed size.
-define(CUT, 50).
%% Payloads above this size are written before the reservation is checked, others after that.
-define(SMALL, 60000).
%% What a file says of its last use: so many seconds before the sequence, and one more for each
%% file. A load notes its use in a file only when an hour has passed; a start removes a damaged file
%% only when it was not changed for ten minutes.
-define(RECENT, 400).
-define(LONG_AGO, 86400).
%% How long whatever is to happen may take. Short, because shrinking waits it out again and again.
-define(DEADLINE, 4000).
%% The same where a disk is waited for.
-define(IO_DEADLINE, 20000).

%%% What the model knows

-type client() :: a | b | c.
-type key() :: 1..6.
-type time() :: {0 | 1, non_neg_integer()}.
%% As a file says it, or as a step of this sequence, which is later.

%% What each save, and each damage, has of its own.
-type serial() :: non_neg_integer().
%% Of a reservation, the number of its save.
-type token() :: serial() | {found, non_neg_integer()}.

-record(file, {
    n :: serial(),
    %% Of its payload.
    size :: non_neg_integer(),
    %% `cut' is shorter than any file, `old' the same for long enough.
    damage = none :: none | payload | newer | cut | old
}).

-record(entry, {
    state :: present | refused | reserved,
    token :: token(),
    size :: non_neg_integer(),
    time :: time() | undefined,
    lease = live :: live | ended
}).

%% A save that is stopped before one of the host's calls.
-record(saving, {
    n :: serial(),
    key :: key(),
    size :: non_neg_integer(),
    way :: sync | async,
    before = check :: check | mark_published | announce,
    %% What it has published.
    published = 0 :: non_neg_integer()
}).

-type mail() ::
    {done, token()}
    | {found, key(), Size :: non_neg_integer(), time()}
    | {gone, key(), token()}
    | {fire, token(), key(), Size :: non_neg_integer()}
    | {down, token()}
    | {checked, token(), key()}.

-record(model, {
    keyed_by = tokens :: tokens | text,
    %% `starting': it is about to look through its root.
    store = down :: down | starting | up | suspended,
    max_bytes = infinity :: pos_integer() | infinity,
    files = #{} :: #{key() => #file{}},
    index = #{} :: #{key() => #entry{}},
    watches = #{} :: #{token() => {key(), Size :: non_neg_integer()}},
    %% Timers of reservations, which the driver has.
    timers = [] :: [{token(), key(), Size :: non_neg_integer()}],
    saving = #{} :: #{client() => #saving{}},
    %% What the last look found, and nobody has evicted yet.
    oldest = [] :: [{time(), key()}],
    %% What the server will hear of when it goes on.
    mail = [] :: [mail()],
    counts = #{} :: #{atom() => non_neg_integer()},
    clock = 0 :: non_neg_integer(),
    %% What the latest step answers.
    answer = ok :: term()
}).

%%% What runs

%% In some states few of the steps can be taken.
store_test_() ->
    machine_test({fun setup_all/0, fun teardown_all/1}, prop_store(), ?SEQUENCES, 500,
                 [{max_size, ?LONGEST}, {constraint_tries, 1000}]).

%% Stores crash on purpose, and say what they find.
setup_all() ->
    Level = silence(),
    Base = temporary_dir(?MODULE),
    Elsewhere = [{KeyedBy, Name, elsewhere(Base, Name)} || {KeyedBy, Name} <- ?ELSEWHERE],
    [ok = file:make_dir(Dir) || Dir <- [root(Base) | [Dir || {_, _, Dir} <- Elsewhere]]],
    persistent_term:put(?MODULE, Base),
    ok = start_writer(tokens),
    [{ok, _} = erllama_cache_store:start_link(Name, #{root => Dir, keyed_by => KeyedBy})
     || {KeyedBy, Name, Dir} <- Elsewhere],
    {Level, Base}.

teardown_all({Level, Base}) ->
    [ok = gen_server:stop(Name) || {_, Name} <- ?ELSEWHERE],
    ok = gen_server:stop(?WRITER),
    ok = erllama_cache_hooked_host:make_keys_of(tokens),
    ok = file:del_dir_r(Base),
    _ = persistent_term:erase(?MODULE),
    ok = unsilence(Level).

root() -> root(persistent_term:get(?MODULE)).
root(Base) -> filename:join(Base, "root").

elsewhere() -> proplists:get_value(keyed_by(), ?ELSEWHERE).
elsewhere(Base, Name) -> filename:join(Base, Name).

%% What the store and the writer are keyed by: asked in many processes.
keyed_by() ->
    {ok, KeyedBy} = erllama_cache_hooked_host:keyed_by(),
    KeyedBy.

start_writer(KeyedBy) ->
    ok = erllama_cache_hooked_host:make_keys_of(KeyedBy),
    {ok, Pid} = ?WRITER:start_link(#{host => erllama_cache_hooked_host, max_concurrent => 10}),
    true = unlink(Pid),
    ok.

prop_store() ->
    property(?MODULE, [#model{keyed_by = KeyedBy} || KeyedBy <- [tokens, text]], fun run/1).

run([{init, #model{keyed_by = KeyedBy}} | _] = Commands) ->
    ok = gen_server:stop(?WRITER),
    ok = start_writer(KeyedBy),
    setup(),
    Driver = self(),
    Hook = fun(Call, Key, Token) -> hook(Driver, Call, Key, Token) end,
    try with_hook(Hook, fun() -> run_commands(?MODULE, Commands) end) of
        {History, Model, Result} ->
            case {get(slow), Result, left_behind()} of
                {true, _, _} -> passed;
                {_, ok, []} -> loads(Model);
                {_, _, Left} -> {Result, {left_behind, Left}, story(Commands, History)}
            end
    after
        teardown()
    end.

%% What was done, with what came of it.
story([{init, _} | Commands], History) ->
    story(Commands, History);
story(Commands, History) ->
    Results = [Result || {_State, Result} <- History],
    [
        {Step, Args, Result}
     || {{set, _, {call, _, Step, Args}}, Result} <- lists:zip(
            lists:sublist(Commands, length(Results)), Results
        )
    ].

setup() ->
    _ = put(slow, false),
    _ = put(began, erlang:system_time(second) - ?RECENT),
    lists:foreach(fun new_client/1, ?CLIENTS).

%% What can be loaded in the end, with what bytes.
loads(#model{store = Store} = Model) when Store =:= up; Store =:= suspended ->
    Wrong = [
        {Key, {wanted, Wanted}, {seen, Seen}}
     || Key <- ?KEYS,
        #model{answer = Wanted} <- [modelled(load, [Key], Model)],
        Seen <- [load(Key)],
        Seen =/= Wanted
    ],
    case Wrong of
        [] -> passed;
        _ -> {loads, Wrong}
    end;
loads(_NoStore) ->
    passed.

left_behind() ->
    [
        {Client, Message}
     || Client <- ?CLIENTS,
        {messages, Messages} <- [process_info(pid(Client), messages)],
        Message <- Messages
    ].

teardown() ->
    [kill(Pid) || Client <- ?CLIENTS, Pid <- lists:usort([pid(Client), saver(Client)])],
    case erase(slow_start) of
        undefined -> ok;
        SlowStart -> {ok, _} = go_on_starting(SlowStart)
    end,
    case whereis(?STORE) of
        undefined -> ok;
        Pid -> kill(Pid)
    end,
    [erase(Timer) || {{timer, _} = Timer, _} <- get()],
    eventually(fun() -> ?WRITER:current() =:= 0 end, ?IO_DEADLINE),
    ok = empty(root()),
    flush().

empty(Dir) ->
    {ok, Names} = file:list_dir(Dir),
    [ok = file:delete(filename:join(Dir, Name)) || Name <- Names],
    ok.

flush() ->
    receive
        _ -> flush()
    after 0 -> ok
    end.

%%% The model

initial_state() ->
    #model{}.

next_state(#model{clock = Clock} = Model, _Result, {call, ?MODULE, Step, Args}) ->
    modelled(Step, Args, Model#model{clock = Clock + 1, answer = ok}).

modelled(save, [Key, Size, N], Model) ->
    case reserve(Key, Size, N, Model) of
        {ok, Reserved} ->
            Published = publish(#saving{n = N, key = Key, size = Size, way = sync}, Reserved),
            announce(file_size(file(Key, Published)), N, Key, Published);
        {Answer, Refused} ->
            Refused#model{answer = Answer}
    end;
modelled(save_no_type, [_Key], Model) ->
    Model#model{answer = {error, {invalid_meta, quant_type}}};
modelled(begin_save, [Client, Key, Size, Way, N], #model{timers = Timers} = Model) ->
    case reserve(Key, Size, N, Model) of
        {ok, #model{saving = Saving} = Reserved} ->
            Timer = [{N, Key, Size + ?OVERHEAD} || Model#model.max_bytes =:= infinity],
            Reserved#model{
                saving = Saving#{Client => #saving{n = N, key = Key, size = Size, way = Way}},
                timers = Timers ++ Timer,
                answer = {before, check}
            };
        {Answer, Refused} ->
            Refused#model{answer = Answer}
    end;
modelled(go_on, [Client], #model{saving = Saving, store = Store} = Model) ->
    #{Client := #saving{n = N, key = Key, before = Before} = Save} = Saving,
    Ended = Model#model{saving = maps:remove(Client, Saving)},
    case stands(N, Key, Model) of
        _ when Store =:= down ->
            Ended#model{answer = noproc};
        false ->
            Ended#model{answer = {error, expired}};
        true when Before =:= check ->
            Published = publish(Save, renewed(Key, Model)),
            Next = Save#saving{
                before = mark_published, published = file_size(file(Key, Published))
            },
            Published#model{saving = Saving#{Client := Next}, answer = {before, mark_published}};
        true when Before =:= mark_published ->
            Marked = renewed(Key, Model),
            Next = Save#saving{before = announce},
            Marked#model{saving = Saving#{Client := Next}, answer = {before, announce}};
        true when Before =:= announce ->
            announce(Save#saving.published, N, Key, Ended)
    end;
modelled(die, [Client], #model{saving = Saving, watches = Watches} = Model) ->
    #{Client := #saving{n = N, way = Way}} = Saving,
    Answer = case Way of
        sync -> ok;
        async -> {error, {saver_died, killed}}
    end,
    Died = Model#model{saving = maps:remove(Client, Saving), answer = Answer},
    case Watches of
        #{N := _} -> tell({down, N}, Died);
        #{} -> Died
    end;
modelled(fire, [N], #model{timers = Timers} = Model) ->
    {value, {N, Key, Size}, Rest} = lists:keytake(N, 1, Timers),
    tell({fire, N, Key, Size}, Model#model{timers = Rest});
modelled(end_lease, [Key], Model) ->
    set_entry(Key, (entry(Key, Model))#entry{lease = ended}, Model);
modelled(renew_beside_loads, [Client], #model{saving = Saving} = Model) ->
    #{Client := #saving{key = Key}} = Saving,
    renewed(Key, Model);
modelled(load, [_Key], #model{store = down} = Model) ->
    Model#model{answer = noproc};
modelled(load, [Key], Model) ->
    Row = entry(Key, Model),
    case file(Key, Model) of
        none ->
            gone(Key, Row, count(misses, Model#model{answer = miss}));
        #file{damage = none, n = N, size = Size} ->
            used(Key, Row, count(hits, Model#model{answer = {ok, N, Size}}));
        #file{damage = Damage} ->
            Refused = count(refused, Model#model{answer = {error, {corrupt, reason(Damage)}}}),
            case Row of
                #entry{state = present} -> set_entry(Key, Row#entry{state = refused}, Refused);
                _ -> Refused
            end
    end;
modelled(longest_prefix, [_Most], #model{store = down} = Model) ->
    Model#model{answer = noproc};
modelled(longest_prefix, [Most], Model) ->
    case [Key || Key <- ?KEYS, Key =< Most, is_present(entry(Key, Model))] of
        [] -> Model#model{answer = miss};
        Prefixes -> Model#model{answer = {ok, lists:max(Prefixes), lists:max(Prefixes)}}
    end;
modelled(delete, [_Key], #model{store = down} = Model) ->
    Model#model{answer = noproc};
modelled(delete, [Key], Model) ->
    gone(Key, entry(Key, Model), no_file(Key, Model));
modelled(damage, [Key, payload, _N], Model) ->
    set_file(Key, (file(Key, Model))#file{damage = payload}, Model);
modelled(damage, [Key, Damage, N], Model) ->
    %% Of what it says itself nothing is believed. When it was changed is.
    set_file(Key, (file(Key, Model))#file{damage = Damage, n = N}, Model);
modelled(remove_file, [Key], Model) ->
    no_file(Key, Model);
modelled(put_file, [Key, Size, N], Model) ->
    set_file(Key, #file{n = N, size = Size}, Model);
modelled(start, [MaxBytes], Model) ->
    begun(blank(MaxBytes, Model));
modelled(start_slowly, [MaxBytes], Model) ->
    (blank(MaxBytes, Model))#model{store = starting};
modelled(started, [Keys], Model) ->
    Loads = [Key || Key <- Keys, _ <- [at_once, again]],
    Started = lists:foldl(fun(Key, M) -> modelled(load, [Key], M) end, begun(Model), Loads),
    Started#model{answer = ok};
modelled(lose, [_How], Model) ->
    lost(Model);
modelled(lose_under_load, [Key, _How], Model) ->
    #model{answer = Answer} = modelled(load, [Key], Model),
    (lost(Model))#model{answer = {either, Answer, noproc}};
modelled(suspend, [], Model) ->
    Model#model{store = suspended};
modelled(resume, [], Model) ->
    drain(Model).

%% Starting and ending

blank(MaxBytes, Model) ->
    Zero = [{What, 0} || What <- [saves, duplicates, hits, misses, refused, evictions,
                             fetched, fetched_bytes, fetch_failures, expired, rejected,
                             pinned]],
    (lost(Model))#model{max_bytes = MaxBytes, counts = maps:from_list(Zero)}.

lost(Model) ->
    Model#model{
        store = down, index = #{}, watches = #{}, timers = [], oldest = [], mail = []
    }.

%% It looks through its root, makes room, and hears of what has come meanwhile.
begun(Model) ->
    {_, Roomy} = make_room(0, lists:foldl(fun scan/2, Model, ?KEYS)),
    drain(Roomy).

scan(Key, Model) ->
    case file(Key, Model) of
        none ->
            Model;
        #file{damage = old} ->
            no_file(Key, Model);
        #file{n = N, damage = Damage} = File ->
            State = case Damage of
                none -> present;
                payload -> present;
                _ -> refused
            end,
            add(Key, State, file_size(File), {0, N}, Model)
    end.

%% What the server hears of

tell(_Mail, #model{store = down} = Model) -> Model;
tell(Mail, #model{store = up} = Model) -> hear(Mail, Model);
tell(Mail, #model{mail = Waiting} = Model) -> Model#model{mail = Waiting ++ [Mail]}.

drain(#model{mail = []} = Model) -> Model#model{store = up};
drain(#model{mail = [Mail | Rest]} = Model) -> drain(hear(Mail, Model#model{mail = Rest})).

hear({done, Token}, Model) ->
    unwatch(Token, Model);
hear({found, Key, Size, Time}, Model) ->
    add(Key, present, Size, Time, Model);
hear({gone, Key, Token}, Model) ->
    case entry(Key, Model) of
        #entry{token = Token, state = State} when State =/= reserved -> no_entry(Key, Model);
        _ -> Model
    end;
hear({fire, Token, Key, Size}, Model) ->
    case stands(Token, Key, Model) of
        true ->
            Watched = watch(Token, Key, Size, Model),
            case is_alive(Token, Model) of
                true -> Watched;
                false -> tell({down, Token}, Watched)
            end;
        false ->
            Model
    end;
hear({down, Token}, #model{watches = Watches} = Model) ->
    case Watches of
        #{Token := {Key, _Size}} ->
            case stands(Token, Key, Model) of
                true -> tell({checked, Token, Key}, Model);
                false -> unwatch(Token, Model)
            end;
        #{} ->
            Model
    end;
hear({checked, Token, Key}, Model) ->
    Checked = case {stands(Token, Key, Model), file(Key, Model)} of
        {true, #file{damage = none, n = N} = File} ->
            settle(Token, Key, file_size(File), {0, N}, Model);
        {true, _} ->
            no_entry(Key, Model);
        {false, _} ->
            Model
    end,
    unwatch(Token, Checked).

%% A save's steps

reserve(_Key, _Size, _N, #model{store = down} = Model) ->
    {noproc, Model};
reserve(Key, Size, N, #model{max_bytes = MaxBytes} = Model) ->
    Room = Size + ?OVERHEAD,
    case claimable(Key, Model) of
        already_present -> {{error, already_present}, count(duplicates, Model)};
        conflict -> {{error, conflict}, Model};
        ok when MaxBytes =:= infinity -> {ok, reserve_unbounded(Key, Room, N, Model)};
        ok when Room > MaxBytes -> {{error, exceeds_max_bytes}, Model};
        ok -> admit(Key, Room, N, Model)
    end.

%% A row makes way if it tells of a file that is not there or that is worth nothing, or if it is a
%% reservation that nobody keeps.
claimable(Key, Model) ->
    case {entry(Key, Model), file(Key, Model)} of
        {#entry{state = present}, #file{}} ->
            already_present;
        {#entry{state = reserved, lease = live, token = Token}, _} ->
            case is_alive(Token, Model) of
                true -> conflict;
                false -> ok
            end;
        _ ->
            ok
    end.

reserve_unbounded(Key, Room, N, Model) ->
    Reserved = set_entry(Key, #entry{state = reserved, token = N, size = Room}, Model),
    case entry(Key, Model) of
        #entry{state = reserved, token = Old} -> tell({done, Old}, Reserved);
        _ -> Reserved
    end.

admit(Key, Room, N, #model{max_bytes = MaxBytes} = Model) ->
    Old = entry(Key, Model),
    %% Nothing is evicted for a save that would not fit beside what is reserved.
    Beside = [Size || {Token, {Other, Size}} <- maps:to_list(Model#model.watches),
                      Other =/= Key, stands(Token, Other, Model)],
    case Room + lists:sum(Beside) =< MaxBytes of
        true -> admit(Key, Old, Room, N, Model);
        false -> {{error, no_room}, Model}
    end.

admit(Key, Old, Room, N, Model) ->
    case make_room(Room - room_of(Old, Model), Model) of
        {ok, Roomy} ->
            case entry(Key, Roomy) of
                Old ->
                    Reserved = #entry{state = reserved, token = N, size = Room},
                    {ok, watch(N, Key, Room, set_entry(Key, Reserved, no_entry(Key, Roomy)))};
                _Evicted ->
                    admit(Key, Room, N, Roomy)
            end;
        {no_room, Tried} ->
            {{error, no_room}, Tried}
    end.

room_of(none, _Model) -> 0;
room_of(#entry{token = Token, state = State, size = Size}, #model{watches = Watches}) ->
    case Watches of
        #{Token := {_Key, Watched}} -> Watched;
        #{} when State =:= reserved -> 0;
        #{} -> Size
    end.

%% The least recently used go, by what one look at all rows has found; who was used since stays.
make_room(_Needed, #model{max_bytes = infinity} = Model) ->
    {ok, Model};
make_room(Needed, Model) ->
    make_room(Needed, Model, some).

make_room(Needed, #model{max_bytes = MaxBytes, oldest = Oldest, index = Rows} = Model, Evicted) ->
    case room_taken(Model) + Needed =< MaxBytes of
        true ->
            {ok, Model};
        false when Oldest =:= [], Evicted =:= none ->
            {no_room, Model};
        false when Oldest =:= [] ->
            Look = [{Time, Key} || {Key, #entry{state = State, time = Time}} <- maps:to_list(Rows),
                                   State =/= reserved],
            make_room(Needed, Model#model{oldest = lists:sort(Look)}, none);
        false ->
            [{Time, Key} | Rest] = Oldest,
            Next = Model#model{oldest = Rest},
            case entry(Key, Model) of
                #entry{state = State, time = Time} when State =/= reserved ->
                    make_room(Needed, count(evictions, no_entry(Key, no_file(Key, Next))), some);
                _UsedSince ->
                    make_room(Needed, Next, Evicted)
            end
    end.

room_taken(#model{watches = Watches, index = Rows}) ->
    lists:sum([Size || {_Key, Size} <- maps:values(Watches)]) +
        lists:sum([Size || #entry{state = State, token = Token, size = Size} <- maps:values(Rows),
                           State =/= reserved, not is_map_key(Token, Watches)]).

%% A good file that is there already is taken for the save's own.
publish(#saving{n = N, key = Key, size = Size}, Model) ->
    case file(Key, Model) of
        #file{damage = none} -> Model;
        _ -> set_file(Key, #file{n = N, size = Size}, Model)
    end.

announce(FileSize, N, Key, Model) ->
    Settled = settle(N, Key, FileSize, now(Model), Model),
    tell({done, N}, count(saves, Settled#model{answer = {ok, key(Key)}})).

settle(Token, Key, Size, Time, Model) ->
    set_entry(Key, #entry{state = present, token = Token, size = Size, time = Time}, Model).

renewed(Key, Model) ->
    set_entry(Key, (entry(Key, Model))#entry{lease = live}, Model).

stands(Token, Key, Model) ->
    case entry(Key, Model) of
        #entry{state = reserved, token = Token} -> true;
        _ -> false
    end.

is_alive(Token, #model{saving = Saving}) ->
    lists:any(fun(#saving{n = N}) -> N =:= Token end, maps:values(Saving)).

%% A load's

used(Key, none, #model{max_bytes = infinity} = Model) ->
    add(Key, present, file_size(file(Key, Model)), now(Model), Model);
used(Key, none, Model) ->
    tell({found, Key, file_size(file(Key, Model)), now(Model)}, Model);
used(Key, #entry{state = refused} = Row, Model) ->
    set_entry(Key, Row#entry{state = present, time = now(Model)}, Model);
used(Key, Row, Model) ->
    set_entry(Key, Row#entry{time = now(Model)}, Model).

gone(Key, #entry{state = State, token = Token} = Row, Model) when State =/= reserved ->
    case Model of
        #model{max_bytes = infinity} -> no_entry(Key, Model);
        _ -> tell({gone, Key, Token}, set_entry(Key, Row#entry{state = refused}, Model))
    end;
gone(_Key, _NoFile, Model) ->
    Model.

reason(payload) -> digest_mismatch;
reason(newer) -> unsupported_version;
reason(_Cut) -> truncated.

%% Parts of the model

add(Key, State, Size, Time, #model{clock = Clock, index = Rows} = Model) ->
    case Rows of
        #{Key := _} ->
            Model;
        #{} ->
            Token = {found, Clock},
            set_entry(Key, #entry{state = State, token = Token, size = Size, time = Time}, Model)
    end.

watch(Token, Key, Size, #model{watches = Watches} = Model) ->
    Model#model{watches = Watches#{Token => {Key, Size}}}.

unwatch(Token, #model{watches = Watches} = Model) ->
    Model#model{watches = maps:remove(Token, Watches)}.

is_present(#entry{state = present}) -> true;
is_present(_) -> false.

entry(Key, #model{index = Rows}) -> maps:get(Key, Rows, none).
set_entry(Key, Row, #model{index = Rows} = Model) -> Model#model{index = Rows#{Key => Row}}.

%% With the room that is still taken for it.
no_entry(Key, #model{index = Rows} = Model) ->
    case entry(Key, Model) of
        none -> Model;
        #entry{token = Token} -> unwatch(Token, Model#model{index = maps:remove(Key, Rows)})
    end.

file(Key, #model{files = Files}) -> maps:get(Key, Files, none).
set_file(Key, File, #model{files = Files} = Model) -> Model#model{files = Files#{Key => File}}.
no_file(Key, #model{files = Files} = Model) -> Model#model{files = maps:remove(Key, Files)}.

file_size(#file{damage = Damage}) when Damage =:= cut; Damage =:= old -> ?CUT;
file_size(#file{size = Size}) -> Size + ?OVERHEAD.

count(What, #model{counts = Counts} = Model) ->
    Model#model{counts = maps:update_with(What, fun(N) -> N + 1 end, Counts)}.

now(#model{clock = Clock}) -> {1, Clock}.

%%% Generators

command(#model{clock = N} = Model) ->
    Idle = ?CLIENTS -- maps:keys(Model#model.saving),
    Saving = maps:keys(Model#model.saving),
    Standing = [Client || Client <- Saving, stands_of(Client, Model)],
    Reserved = [Key || {Key, #entry{state = reserved}} <- maps:to_list(Model#model.index)],
    Good = [Key || {Key, #file{damage = none}} <- maps:to_list(Model#model.files)],
    Timers = [Token || {Token, _, _} <- Model#model.timers],
    Store = Model#model.store,
    %% Where little can be done, what can be done there is done more often.
    {Down, Starting} = {Store =:= down, Store =:= starting},
    Candidates =
        [{10, do(save, [key(), size(), N])} || not Down] ++
        [{1, do(save, [key(), size(), N])} || Down] ++
        [{1, do(save_no_type, [key()])}] ++
        [{9, do(begin_save, [oneof(Idle), key(), size(), way(), N])} || Idle =/= [], not Down] ++
        [{1, do(begin_save, [oneof(Idle), key(), size(), way(), N])} || Idle =/= [], Down] ++
        [{30, do(begin_save, [oneof(Idle), oneof(Good), 12000, way(), N])}
         || Idle =/= [], Good =/= [], Starting, Model#model.max_bytes =:= infinity] ++
        [{14, do(go_on, [oneof(Saving)])} || Saving =/= []] ++
        [{4, do(die, [oneof(Saving)])} || Saving =/= []] ++
        [{5, do(fire, [oneof(Timers)])} || Timers =/= []] ++
        [{3, do(end_lease, [oneof(Reserved)])} || Reserved =/= []] ++
        [{1, do(renew_beside_loads, [oneof(Standing)])} || Standing =/= []] ++
        [{8, do(load, [key()])} || not Down] ++
        [{1, do(load, [key()])} || Down] ++
        [{6, do(longest_prefix, [range(0, 8)])} || not Down] ++
        [{1, do(longest_prefix, [range(0, 8)])} || Down] ++
        [{2, do(delete, [key()])} || not Down] ++
        [{3, do(damage, [oneof(Good), damage(), N])} || Good =/= []] ++
        [{1, do(remove_file, [key()])}] ++
        [{3, do(put_file, [key(), size(), N])}] ++
        [{2, do(suspend, [])}] ++
        [{8, do(resume, [])}] ++
        [{1, do(lose, [oneof([kill, stop])])}] ++
        [{1, do(lose_under_load, [key(), oneof([kill, stop])])}] ++
        [{8, do(start, [max_bytes()])}] ++
        [{4, do(start_slowly, [max_bytes()])}] ++
        [{16, do(started, [loaded(Model)])} || Starting],
    frequency([Each || {_, {call, _, Step, _}} = Each <- Candidates, is_step(Step, Model)]).

do(Step, Args) ->
    {call, ?MODULE, Step, Args}.

key() ->
    oneof(?KEYS).

size() ->
    frequency([{4, 12000}, {4, 24000}, {1, 48000}, {1, 72000}]).

way() ->
    oneof([sync, async]).

damage() ->
    oneof([payload, newer, cut, old]).

max_bytes() ->
    frequency([{4, infinity}, {2, 50000}, {3, 80000}, {2, 130000}]).

loaded(Model) ->
    oneof([[]] ++ [[Key] || Key <- ?KEYS, is_step(started, [[Key]], Model)]).

%% Which steps can be taken with a store in this state. While one is starting, nothing else has a
%% turn for its I/O.
is_step(save, #model{store = Store}) -> Store =/= starting;
is_step(load, #model{store = Store}) -> Store =/= starting;
is_step(delete, #model{store = Store}) -> Store =/= starting;
is_step(put_file, #model{store = Store}) -> Store =/= starting;
is_step(end_lease, #model{store = Store}) -> Store =/= down;
is_step(renew_beside_loads, #model{store = Store}) -> Store =/= down;
is_step(suspend, #model{store = Store}) -> Store =:= up;
is_step(resume, #model{store = Store}) -> Store =:= suspended;
is_step(lose, #model{store = Store}) -> Store =:= up orelse Store =:= suspended;
is_step(lose_under_load, Model) -> is_step(lose, Model);
is_step(start, #model{store = Store}) -> Store =:= down;
is_step(start_slowly, #model{store = Store}) -> Store =:= down;
is_step(started, #model{store = Store}) -> Store =:= starting;
is_step(_, _) -> true.

precondition(Model, {call, _, Step, Args}) ->
    is_step(Step, Model) andalso is_step(Step, Args, Model).

is_step(save, [Key, _Size, _N], Model) -> asks_no_server(Key, Model);
is_step(begin_save, [Client, Key, Size, _Way, _N], Model) ->
    not is_map_key(Client, Model#model.saving) andalso asks_no_server(Key, Model) andalso
        (Model#model.store =/= starting orelse Size =< ?SMALL);
is_step(go_on, [Client], Model) ->
    is_map_key(Client, Model#model.saving) andalso
        not (Model#model.store =:= starting andalso stands_of(Client, Model));
is_step(die, [Client], Model) -> is_map_key(Client, Model#model.saving);
is_step(fire, [N], Model) -> lists:keymember(N, 1, Model#model.timers);
is_step(end_lease, [Key], Model) -> is_record(entry(Key, Model), entry) andalso
    (entry(Key, Model))#entry.state =:= reserved;
is_step(renew_beside_loads, [Client], Model) -> stands_of(Client, Model);
is_step(damage, [Key, _, _], Model) -> is_good(Key, Model);
is_step(started, [[]], _Model) -> true;
is_step(started, [[Key]], #model{index = Rows} = Model) ->
    %% Else it could be evicted or settled before the load or after it.
    map_size(Rows) =:= 0 andalso (file(Key, Model) =:= none orelse is_good(Key, Model)) andalso
        map_get(evictions, (begun(Model))#model.counts) =:= 0;
is_step(lose, [How], Model) -> How =:= kill orelse Model#model.store =:= up;
is_step(lose_under_load, [_Key, How], Model) -> is_step(lose, [How], Model);
is_step(_, _, _) -> true.

%% In a bounded store the server is asked for room, and would not answer now.
asks_no_server(Key, #model{store = Store, max_bytes = MaxBytes} = Model) ->
    Answers = Store =:= up orelse Store =:= down,
    Answers orelse MaxBytes =:= infinity orelse claimable(Key, Model) =/= ok.

stands_of(Client, #model{saving = Saving} = Model) ->
    case Saving of
        #{Client := #saving{n = N, key = Key}} -> stands(N, Key, Model);
        #{} -> false
    end.

is_good(Key, Model) ->
    case file(Key, Model) of
        #file{damage = none} -> true;
        _ -> false
    end.

%%% The store beside the model

%% The server may take a moment to hear of what has happened.
postcondition(Model, {call, _, _, _} = Call, Result) ->
    #model{answer = Answer} = Expected = next_state(Model, Result, Call),
    Wanted = {wanted(Answer, Result), picture(Expected), []},
    get(slow) orelse
        matches(Wanted, fun() -> {Result, observed(Expected#model.store), own_messages()} end,
                ?DEADLINE).

wanted({either, _, Result}, Result) -> Result;
wanted({either, Wanted, _}, _Result) -> Wanted;
wanted(Wanted, _Result) -> Wanted.

picture(#model{store = Store, files = Files} = Model) ->
    #{
        disk => [{Key, content(File), file_size(File)} || {Key, File} <- maps:to_list(Files)],
        index => index(Store, Model),
        books => books(Store, Model)
    }.

content(#file{damage = none, n = N, size = Size}) -> {N, Size};
content(_Damaged) -> damaged.

index(down, _Model) ->
    none;
index(_Store, #model{index = Rows, counts = Counts, max_bytes = MaxBytes} = Model) ->
    Sizes = [{State, Size} || #entry{state = State, size = Size} <- maps:values(Rows)],
    Files = [Size || {State, Size} <- Sizes, State =/= reserved],
    {
        [{Key, State, Size} || {Key, #entry{state = State, size = Size}} <- maps:to_list(Rows)],
        [{{Model#model.keyed_by, Key * length_of_one(Model)}, 1}
         || {Key, Row} <- maps:to_list(Rows), is_present(Row)],
        Counts#{
            max_bytes => MaxBytes, files => length(Files), bytes => lists:sum(Files),
            reservations => length(Sizes) - length(Files)
        }
    }.

length_of_one(#model{keyed_by = tokens}) -> 1;
length_of_one(#model{keyed_by = text}) -> ?UNIT.

%% Of an unbounded store nobody asks how much of it is used.
books(up, #model{max_bytes = infinity, watches = Watches}) ->
    #{watches => map_size(Watches)};
books(up, #model{watches = Watches} = Model) ->
    #{watches => map_size(Watches), used => room_taken(Model), should => room_taken(Model)};
books(_Busy, _Model) ->
    none.

observed(Store) ->
    #{disk => on_disk(), index => observed_index(Store), books => observed_books(Store)}.

on_disk() ->
    {ok, Names} = file:list_dir(root()),
    Keys = maps:from_list([{filename:basename(path(Key)), Key} || Key <- ?KEYS]),
    lists:sort([on_disk(maps:get(Name, Keys, Name)) || Name <- Names]).

on_disk(Key) when is_integer(Key) ->
    {ok, File} = file:read_file(path(Key)),
    Size = byte_size(File),
    case File of
        <<"KVC", Version, _:(?OVERHEAD - 4)/binary, N:32, _/binary>> when Version =< 2 ->
            Payload = binary:part(File, ?OVERHEAD, Size - ?OVERHEAD),
            case payload(N, Size - ?OVERHEAD) of
                Payload -> {Key, {N, Size - ?OVERHEAD}, Size};
                _ -> {Key, damaged, Size}
            end;
        _ ->
            {Key, damaged, Size}
    end;
on_disk(Name) ->
    Name.

observed_index(down) ->
    {undefined, undefined} = {whereis(?STORE), ets:whereis(?STORE)},
    none;
observed_index(_Store) ->
    Names = maps:from_list([{key(Key), Key} || Key <- ?KEYS]),
    Rows = fun(Row, Rows) -> [named(Row, Names) | Rows] end,
    {
        lists:sort(erllama_cache_index:fold(?STORE, Rows, [])),
        lists:sort(maps:to_list(erllama_cache_index:length_counts(?STORE))),
        maps:without([name, root, tier, keyed_by], erllama_cache_store:info(?STORE))
    }.

named(Row, Names) ->
    {map_get(Row#row.key, Names), Row#row.state, Row#row.size}.

observed_books(up) ->
    Books = gen_server:call(?STORE, audit),
    case erllama_cache_store:info(?STORE) of
        #{max_bytes := infinity} -> maps:with([watches], Books);
        _ -> maps:with([watches, used, should], Books)
    end;
observed_books(_Busy) ->
    none.

%%% Steps

save(Key, Size, N) ->
    use(fun() -> save_to(?STORE, Key, Size, N) end).

save_to(Store, Key, Size, N) ->
    ?WRITER:save(Store, disk, meta(Key, N), payload(N, Size)).

%% A type that has no byte of its own.
save_no_type(Key) ->
    step(fun() ->
        ?WRITER:save(?STORE, disk, (meta(Key))#{quant_type := mxfp4}, payload(0, 4))
    end).

begin_save(Client, Key, Size, Way, N) ->
    use(fun() ->
        ok = ask(Client, {save, Way, Key, Size, N}),
        Answer = await(Client),
        receive
            {timer, Server, Message, true} ->
                _ = put({timer, N}, {Server, Message});
            {timer, _, _, false} ->
                %% It has gone off: not fast enough. Nothing is said of this sequence.
                _ = put(slow, true)
        after 0 -> ok
        end,
        Answer
    end).

go_on(Client) ->
    use(fun() -> let_go(Client) end).

%% A small save that needs more than one slice asks once more, as a large one does.
let_go(Client) ->
    saver(Client) ! go_on,
    case await(Client) of
        {before, check} -> let_go(Client);
        Answer -> Answer
    end.

%% Another takes its name. Of a save in the background, the process that saves is killed.
die(Client) ->
    step(fun() ->
        Saver = saver(Client),
        ok = kill(Saver),
        ok = death_is_known(Saver),
        case pid(Client) of
            Saver -> new_client(Client);
            _ -> await(Client)
        end
    end).

%% What the server hears next, it hears after this.
death_is_known(Pid) ->
    case whereis(?STORE) of
        undefined ->
            ok;
        Server ->
            eventually(fun() ->
                {monitors, Monitored} = process_info(Server, monitors),
                not lists:member({process, Pid}, Monitored)
            end, ?DEADLINE)
    end.

fire(N) ->
    step(fun() ->
        {Server, Message} = erase({timer, N}),
        Server ! Message,
        ok
    end).

end_lease(Key) ->
    step(fun() -> erllama_cache_index:end_lease(?STORE, key(Key)) end).

%% A save asks whether its reservation stands, while loads note their uses in the same row.
renew_beside_loads(Client) ->
    step(fun() ->
        Stop = make_ref(),
        Key = get({reserved, Client}),
        {Loader, Monitor} = spawn_monitor(fun() -> note_uses(Key, Stop) end),
        Ref = make_ref(),
        saver(Client) ! {do, fun renew/2, self(), Ref},
        Answers = receive {Ref, Each} -> Each after ?DEADLINE -> no_answer end,
        Loader ! Stop,
        receive {'DOWN', Monitor, process, Loader, normal} -> ok end,
        [Answer] = Answers,
        Answer
    end).

note_uses(Key, Stop) ->
    receive
        Stop -> ok
    after 0 ->
        Now = erlang:system_time(millisecond),
        _ = erllama_cache_index:use(?STORE, Key, Now, Now),
        note_uses(Key, Stop)
    end.

renew(Key, Token) ->
    lists:usort([
        begin
            ok = erllama_cache_index:end_lease(?STORE, Key),
            erllama_cache_store:check(?STORE, Key, Token)
        end
     || _ <- lists:seq(1, 50)
    ]).

load(Key) ->
    use(fun() -> loaded_from(Key) end).

loaded_from(Key) ->
    case erllama_cache_store:load(?STORE, key(Key)) of
        {ok, Info, <<N:32, _/binary>> = Payload} ->
            Said = maps:with([tokens, prompt_text], Info),
            Said = (prompt(Key))#{tokens := << <<Token:32/little>> || Token <- tokens(Key) >>},
            Size = byte_size(Payload),
            Payload = payload(N, Size),
            {ok, N, Size};
        Other ->
            Other
    end.

longest_prefix(Most) ->
    step(fun() ->
        Meta = maps:merge(meta(1), prompt(Most)),
        case erllama_cache_store:longest_prefix(?STORE, Meta) of
            {ok, Bytes, Length} ->
                [Key] = [Key || Key <- ?KEYS, key(Key) =:= Bytes],
                {ok, Key, Length div length_of_one(#model{keyed_by = keyed_by()})};
            Other ->
                Other
        end
    end).

delete(Key) ->
    step(fun() -> erllama_cache_store:delete(?STORE, key(Key)) end).

damage(Key, Damage, N) ->
    step(fun() ->
        Path = path(Key),
        {ok, File} = file:read_file(Path),
        Most = byte_size(File) - 1,
        <<Start:3/binary, Version, Rest/binary>> = File,
        ok = file:write_file(Path, case Damage of
            payload -> [binary:part(File, 0, Most), binary:last(File) bxor 1];
            newer -> [Start, Version + 8, Rest];
            _ -> binary:part(File, 0, ?CUT)
        end),
        Changed = case Damage of
            old -> get(began) - ?LONG_AGO;
            _ -> get(began) + N
        end,
        file:write_file_info(Path, #file_info{mtime = Changed}, [{time, posix}])
    end).

remove_file(Key) ->
    step(fun() ->
        case file:delete(path(Key)) of
            {error, enoent} -> ok;
            Deleted -> Deleted
        end
    end).

put_file(Key, Size, N) ->
    step(fun() ->
        {ok, Saved} = save_to(elsewhere(), Key, Size, N),
        Elsewhere = elsewhere(persistent_term:get(?MODULE), elsewhere()),
        file:rename(erllama_cache_path:final(Elsewhere, Saved), path(Key))
    end).

start(MaxBytes) ->
    step(fun() ->
        {ok, _} = start_store(MaxBytes),
        ok
    end).

start_store(MaxBytes) ->
    {ok, Pid} = erllama_cache_store:start_link(?STORE, #{
        root => root(), max_bytes => MaxBytes, keyed_by => keyed_by()
    }),
    true = unlink(Pid),
    {ok, Pid}.

%% It is stopped when it is about to look through its root: others see it running by then.
start_slowly(MaxBytes) ->
    step(fun() ->
        Turns = all_turns(),
        ok = taken(Turns),
        Driver = self(),
        Ref = make_ref(),
        _ = spawn(fun() -> Driver ! {Ref, start_store(MaxBytes)} end),
        _ = put(slow_start, {Turns, Ref}),
        eventually(fun() -> is_pid(whereis(?STORE)) end, ?DEADLINE),
        waits_for_a_turn(whereis(?STORE))
    end).

go_on_starting({Turns, Ref}) ->
    ok = erllama_cache_hooked_host:go_on(Turns),
    receive
        {Ref, Started} -> Started
    after ?IO_DEADLINE -> error(no_start)
    end.

%% Loads run beside its look. Each key is loaded once more, so that its last use is known.
started(Keys) ->
    use(fun() ->
        Loads = [begin_load(Key) || Key <- Keys],
        {ok, _} = go_on_starting(erase(slow_start)),
        _ = [end_load(Load) || Load <- Loads],
        _ = sys:get_state(?STORE),
        ok = next_millisecond(),
        _ = [loaded_from(Key) || Key <- Keys],
        ok
    end).

begin_load(Key) ->
    {Pid, Monitor} = spawn_monitor(fun() ->
        exit({loaded, step(fun() -> loaded_from(Key) end)})
    end),
    ok = waits_for_a_turn(Pid),
    {Pid, Monitor}.

end_load({Pid, Monitor}) ->
    receive
        {'DOWN', Monitor, process, Pid, {loaded, Loaded}} -> Loaded
    after ?IO_DEADLINE -> error(no_load)
    end.

lose(How) ->
    step(fun() -> end_store(How) end).

%% The load is about to read the file.
lose_under_load(Key, How) ->
    step(fun() ->
        Turns = all_turns(),
        ok = taken(Turns),
        Load = begin_load(Key),
        ok = end_store(How),
        ok = erllama_cache_hooked_host:go_on(Turns),
        end_load(Load)
    end).

end_store(How) ->
    _ = [erase(Timer) || {{timer, _} = Timer, _} <- get()],
    case How of
        kill -> kill(whereis(?STORE));
        stop -> gen_server:stop(?STORE)
    end.

suspend() ->
    step(fun() -> sys:suspend(?STORE) end).

resume() ->
    step(fun() -> sys:resume(?STORE) end).

%% A step that uses files, in a millisecond that no other step has used files in.
use(Step) ->
    ok = next_millisecond(),
    step(Step).

%%% What is saved

meta(Key, N) ->
    (meta(Key))#{last_used_time => get(began) + N}.

%% What a longer prompt takes, a longer name of the host has, so that all files are of one size.
meta(Key) ->
    Hostname = binary:copy(<<"h">>, 1 + ?UNIT * (lists:last(?KEYS) - Key)),
    Meta = (erllama_cache_test_util:meta())#{hostname => Hostname, erllama_version => <<>>},
    maps:merge(Meta, prompt(Key)).

%% The other of the two is empty.
prompt(Units) ->
    case keyed_by() of
        tokens -> #{tokens => lists:seq(1, Units), prompt_text => <<>>};
        text -> #{tokens => [], prompt_text => binary:copy(<<"text">>, Units)}
    end.

tokens(Key) ->
    #{tokens := Tokens} = prompt(Key),
    Tokens.

payload(N, Size) ->
    binary:copy(<<N:32>>, Size div 4).

key(Key) ->
    {ok, Bytes} = erllama_cache_store:key(meta(Key), #{keyed_by => keyed_by()}),
    Bytes.

path(Key) ->
    erllama_cache_path:final(root(), key(Key)).

%%% Clients

%% A client saves, again and again. It answers when the save is over; before that, the process that
%% saves tells of each stop.
new_client(Client) ->
    Driver = self(),
    Began = get(began),
    Pid = spawn(fun() ->
        _ = put(began, Began),
        _ = monitor(process, Driver),
        serve(Driver)
    end),
    _ = put({pid, Client}, Pid),
    _ = put({saver, Client}, Pid),
    ok.

pid(Client) -> get({pid, Client}).
saver(Client) -> get({saver, Client}).

ask(Client, Request) ->
    Ref = make_ref(),
    pid(Client) ! {Ref, Request},
    _ = put({ref, Client}, Ref),
    ok.

await(Client) ->
    Ref = get({ref, Client}),
    receive
        {before, Call, Saver, Key} ->
            _ = put({saver, Client}, Saver),
            _ = put({reserved, Client}, Key),
            {before, Call};
        {answer, Ref, Answer} ->
            Answer
    after ?IO_DEADLINE -> no_answer
    end.

serve(Driver) ->
    receive
        {Ref, {save, Way, Key, Size, N}} ->
            Driver ! {answer, Ref, step(fun() -> save_by(Way, Key, Size, N) end)},
            serve(Driver);
        {'DOWN', _, process, Driver, _} ->
            ok
    end.

save_by(sync, Key, Size, N) ->
    save_to(?STORE, Key, Size, N);
save_by(async, Key, Size, N) ->
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta(Key, N), payload(N, Size)),
    receive
        {?WRITER, Ref, {error, {raised, exit, {noproc, _}, _}}} -> noproc;
        {?WRITER, Ref, Result} -> Result
    end.

%% In the process that saves. The driver's own saves go on.
hook(Driver, _Call, _Key, _Token) when self() =:= Driver ->
    ok;
hook(Driver, reserve, Key, Token) ->
    #row{size = Size} = erllama_cache_index:row(?STORE, Key),
    take_timer(Driver, Key, Size, Token);
hook(Driver, Call, Key, Token) ->
    Monitor = monitor(process, Driver),
    Driver ! {before, Call, self(), Key},
    wait(Monitor, Key, Token).

wait(Monitor, Key, Token) ->
    receive
        go_on ->
            true = demonitor(Monitor, [flush]),
            ok;
        {do, Fun, From, Ref} ->
            From ! {Ref, Fun(Key, Token)},
            wait(Monitor, Key, Token);
        {'DOWN', Monitor, process, _, _} ->
            exit(normal)
    end.

take_timer(Driver, Key, Size, Token) ->
    case erllama_cache_store:info(?STORE) of
        #{max_bytes := infinity} ->
            Taken = is_integer(erlang:cancel_timer(Token)),
            Message = {timeout, Token, {watch, Key, Size, self()}},
            Driver ! {timer, whereis(?STORE), Message, Taken};
        _Bounded ->
            ok
    end.

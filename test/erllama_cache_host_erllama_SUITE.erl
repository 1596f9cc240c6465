%% A save and erllama's modules: what it asks of them and in which order, what becomes of it when
%% one of them fails, and leases that end or go to another saver meanwhile. A save that waits for
%% its turn is in erllama_cache_io_limit_SUITE.
-module(erllama_cache_host_erllama_SUITE).

-include("erllama_cache_erllama_util.hrl").
-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-compile(export_all).

-define(READER, erllama_cache_reader).
-define(DUPLICATE_DROPPED, 16).
%% Milliseconds.
-define(LEASE, 60000).
%% What the kinds of host do not have in common.
-define(MAKE_4, {erllama_cache_key, make, 4}).
-define(MAKE_TEXT, {erllama_cache_key, make_text, 4}).
-define(ANNOUNCE_5, {?META_SRV, announce_saved, 5}).
-define(ANNOUNCE_6, {?META_SRV, announce_saved, 6}).

-import(erllama_cache_test_util, [
    files/1, open_files/1, file_of/2, eventually/1, actor/0, ask/2, tell/2, answer/2, kill/1,
    own_messages/0, run_node/3
]).
-import(erllama_cache_erllama_util, [
    load_fakes/1, load_fake/2, meta/0, meta/1, by_kind/2, key_of/2, encoded/1, restart_writer/1,
    waiting/0, save/0, save/1, save/2, untidy_actor/0, assert_nothing_left/1, assert_only/2,
    nothing_open/1, restart_tier_server/0, restart_tier_server/1, script_busy/0, script_failure/0,
    host_calls/0, calls/0, calls_after_the_key/0, calls_but_the_check/0, is_about_the_key/1, args/1,
    stored_payload/2, stored_quant_byte/2, payload/1, as_host/0, oracle/1, on_peer/2
]).

suite() ->
    erllama_cache_erllama_util:suite().

all() ->
    erllama_cache_erllama_util:all().

groups() ->
    erllama_cache_erllama_util:groups([
        {kinds, [], [
            host_is_recognised_at_the_start,
            modules_are_loaded_to_recognise_it,
            host_of_neither_kind,
            host_replaced_under_a_running_writer
        ]},
        {calls, [], [
            save_calls_the_host_in_order,
            save_counts_its_reason,
            save_of_a_stored_key,
            save_of_a_reserved_key,
            save_names_both_tiers,
            key_and_quant_byte_are_the_hosts
        ]},
        {roots, [], [
            root_is_asked_for_once,
            tier_server_that_was_asked_is_busy,
            tier_server_that_was_asked_ends,
            restarted_tier_server_is_asked,
            root_is_not_kept_across_a_restart,
            root_is_not_kept_across_a_start
        ]},
        {failures, [], [
            tier_server_is_not_there,
            tier_server_is_busy,
            reservation_expires_while_writing,
            reservation_expires_before_mark_published,
            reservation_expires_before_announce_saved,
            host_raises,
            owner_dies_in_a_call_to_the_host
        ]},
        {leases, [], [
            second_saver_meets_a_conflict,
            key_of_a_dead_saver_is_free_at_once,
            time_in_the_queue_is_no_time_of_a_lease,
            regranted_before_publishing,
            regranted_after_publishing,
            regranted_before_announcing,
            turn_that_follows_waits_for_the_announcement,
            failure_answers_nobody_who_waits
        ]}
    ]).

%%% The kind of host

host_is_recognised_at_the_start(Config) ->
    ?assertEqual({ok, by_kind(tokens, text)}, erllama_cache_host_erllama:keyed_by()),
    {ok, Key} = save(),
    Version = by_kind(1, 2),
    ?assertMatch({ok, <<"KVC", Version, _/binary>>},
                 file:read_file(file_of(?config(root, Config), Key))).

%% Unless code is embedded, the host's modules are loaded when they are first called.
modules_are_loaded_to_recognise_it(_Config) ->
    on_peer(["erl"], fun() ->
        ok = lists:foreach(fun unload/1, [erllama_cache_key, ?META_SRV]),
        %% The kind whose modules are on the disk.
        ?assertEqual({ok, tokens}, erllama_cache_host_erllama:keyed_by())
    end).

%% One that has a module of each kind, and one that is not there.
host_of_neither_kind(_Config) ->
    on_peer(["erl"], fun() ->
        ok = load_fake(erllama_cache_key, by_kind(text, tokens)),
        Lacking = by_kind([?MAKE_4, ?ANNOUNCE_6], [?ANNOUNCE_5, ?MAKE_TEXT]),
        ?assertEqual({error, {unknown_host, Lacking}}, ?WRITER:start_link(1)),
        ?assertEqual(undefined, whereis(?WRITER))
    end),
    ?assertEqual({0, ""}, run_node("", {?MODULE, start_without_a_host}, [])).

start_without_a_host() ->
    All = [?MAKE_4, ?ANNOUNCE_5, ?MAKE_TEXT, ?ANNOUNCE_6],
    {error, {unknown_host, All}} = ?WRITER:start_link(1),
    halt(0).

unload(Module) ->
    _ = code:purge(Module),
    _ = code:delete(Module),
    false = code:is_loaded(Module),
    ok.

%% The next writer looks again. The other host deletes at its start what it does not take.
host_replaced_under_a_running_writer(Config) ->
    Root = ?config(root, Config),
    {ok, First} = save(),
    ok = erllama_fake:stop(),
    ok = load_fakes(by_kind(text, tokens)),
    ok = erllama_fake:start(?TIER, Root),
    ?assertError(undef, save()),
    ?assertEqual({[], 0}, {?META_SRV:reserved(), ?WRITER:current()}),
    _ = restart_writer(?LIMIT),
    {ok, Second} = save(),
    ?assertNotEqual(First, Second),
    ?assertEqual(key_of(meta(), 7), Second),
    ?assertMatch({ok, #{key := Second}, ?PAYLOAD}, ?DISK_SRV:load(?TIER, Second)),
    assert_only(file_of(Root, Second), Config).

%%% What is asked

save_calls_the_host_in_order(Config) ->
    Root = ?config(root, Config),
    Self = self(),
    Payload = crypto:strong_rand_bytes(100000),
    Look = fun(Name) ->
        {before, fun(_Args) -> Self ! {Name, ?WRITER:current(), files(Root), open_files(Root)} end}
    end,
    [ok = erllama_fake:script(Name, [Look(Name)]) || Name <- host_calls()],
    {ok, Key} = ?WRITER:save(?TIER, disk, meta(), Payload),
    ?assertEqual(0, ?WRITER:current()),

    #{quant_type := QuantType, tokens := Tokens, prompt_text := Text} = meta(),
    ?assertEqual(key_of(meta(), 7), Key),
    Path = file_of(Root, Key),
    {ok, <<Header:48/binary, _/binary>> = File} = file:read_file(Path),
    Size = byte_size(File),
    ?assertEqual(Payload, payload(File)),

    %% Every call comes from here, and the key is known before anything is reserved.
    ?assertEqual([Self], lists:usort([Caller || {_, _, Caller} <- erllama_fake:calls()])),
    {AboutTheKey, Others} = lists:splitwith(fun(Name) -> is_about_the_key(Name) end, calls()),
    ?assertEqual(lists:sort([by_kind(make, make_text), quant_byte]),
                 lists:sort(AboutTheKey)),
    ?assertEqual([[QuantType]], args(quant_byte)),
    ?assertEqual(
        [reserve_save, dir, check_reservation, mark_published, announce_saved, incr], Others
    ),
    ?assertEqual([[Key, disk, Self]], args(reserve_save)),
    ?assertEqual([[?TIER]], args(dir)),
    [[Key, Token]] = args(check_reservation),
    ?assert(is_reference(Token)),
    ?assertEqual([[Key, Token, Path]], args(mark_published)),
    Announced = [Key, Token, Size, Header, encoded(Tokens)],
    ?assertEqual([Announced ++ by_kind([], [byte_size(Text)])], args(announce_saved)),
    ?assertEqual([[4]], args(incr)),
    ?assertEqual({[], [Key]}, {?META_SRV:reserved(), ?META_SRV:stored()}),

    %% The slot is held all the time. There is a file when it has been checked that the key is
    %% still ours, it shows when it is published, and nothing stays open.
    Name = filename:basename(Path),
    [
        receive
            {Call, Held, Files, Open} ->
                ?assertEqual({Call, 1}, {Call, Held}),
                Published = lists:member(Call, [mark_published, announce_saved, incr]),
                ?assertEqual({Call, [Name || Published]}, {Call, Files}),
                Writing = Call =:= check_reservation andalso filelib:is_dir("/proc/self/fd"),
                ?assertEqual({Call, Writing}, {Call, Open =/= []})
        after 0 -> error({not_called, Call})
        end
     || Call <- calls()
    ],
    ok = nothing_open(Root).

save_counts_its_reason(_Config) ->
    Counters = [
        {cold, #{4 => 1}},
        {continued, #{5 => 1}},
        {finish, #{6 => 1}},
        {evict, #{7 => 1}},
        {shutdown, #{8 => 1}},
        {unknown, #{}}
    ] ++ by_kind([], [{agent_prefix, #{22 => 1}}]),
    [
        begin
            ok = erllama_cache_counters:reset(),
            {ok, _} = save((meta([N]))#{save_reason := Reason}),
            ?assertEqual({Reason, Counted}, {Reason, erllama_cache_counters:all()})
        end
     || {N, {Reason, Counted}} <- lists:zip(lists:seq(1, length(Counters)), Counters)
    ].

save_of_a_stored_key(Config) ->
    {ok, Key} = save(),
    ok = erllama_fake:forget_calls(),
    ok = erllama_cache_counters:reset(),
    ?assertEqual({error, already_present}, save(meta(), <<"another">>)),
    ?assertEqual(#{?DUPLICATE_DROPPED => 1}, erllama_cache_counters:all()),
    ?assertEqual([reserve_save, incr], calls_after_the_key()),
    ?assertEqual({?PAYLOAD, 0}, {stored_payload(Config, Key), ?WRITER:current()}).

save_of_a_reserved_key(Config) ->
    {ok, Key} = save(),
    ok = ?META_SRV:forget(Key),
    ok = file:delete(file_of(?config(root, Config), Key)),
    Actor = actor(),
    {ok, Token} = ask(Actor, fun() -> ?META_SRV:reserve_save(Key, disk, self()) end),
    ok = erllama_fake:forget_calls(),
    ok = erllama_cache_counters:reset(),
    ?assertEqual({error, conflict}, save()),
    ?assertEqual([reserve_save], calls_after_the_key()),
    ?assertEqual(#{}, erllama_cache_counters:all()),
    ?assertEqual([{Key, Token}], ?META_SRV:reserved()),
    ok = ?META_SRV:cancel_reservation(Key, Token),
    assert_nothing_left(Config).

save_names_both_tiers(_Config) ->
    {ok, OnDisk} = ?WRITER:save(?TIER, disk, meta([1]), ?PAYLOAD, 0),
    {ok, InRam} = ?WRITER:save(?TIER, ram_file, meta([2]), ?PAYLOAD, infinity),
    ?assertEqual([[OnDisk, disk, self()], [InRam, ram_file, self()]], args(reserve_save)).

%% A host whose table has grown must find what is saved.
key_and_quant_byte_are_the_hosts(Config) ->
    ok = erllama_cache_key:grow(a_later_quant, 77),
    Meta = (meta())#{quant_type := a_later_quant},
    {ok, Theirs} = save(Meta),
    ?assertEqual(key_of(Meta, 77), Theirs),
    ?assertEqual(77, stored_quant_byte(Config, Theirs)),
    ?assertMatch({ok, #{key := Theirs}, ?PAYLOAD}, ?DISK_SRV:load(?TIER, Theirs)),
    {ok, Ours} = save(),
    ?assertNotEqual(Theirs, Ours),
    ?assertEqual(7, stored_quant_byte(Config, Ours)),
    %% Left on purpose, and for this host only: the oracle's table has not grown.
    File = file_of(?config(root, Config), Theirs),
    ?assertMatch({0, _}, oracle(["check", File])),
    ?assertMatch({1, _}, oracle(["check", as_host(), File])),
    ok = file:delete(File).

%%% The root

%% By no matter which process.
root_is_asked_for_once(Config) ->
    Savers = [actor() || _ <- lists:seq(1, 3)],
    [
        begin
            {ok, Key} = ask(Saver, fun() -> save(meta([N])) end),
            ?assertMatch({ok, _, ?PAYLOAD}, ask(Saver, fun() -> ?READER:load(?TIER, Key) end)),
            ?assertEqual(?PAYLOAD, stored_payload(Config, Key))
        end
     || {N, Saver} <- lists:zip(lists:seq(1, 9), Savers ++ Savers ++ Savers)
    ],
    ?assertEqual([[?TIER]], args(dir)).

tier_server_that_was_asked_is_busy(Config) ->
    {ok, First} = save(meta([1])),
    ok = sys:suspend(?TIER),
    ok = script_busy(),
    {ok, Second} = ask(actor(), fun() -> save(meta([2])) end),
    ok = sys:resume(?TIER),
    ?assertEqual(lists:sort([First, Second]), lists:sort(?META_SRV:stored())),
    ?assertEqual(?PAYLOAD, stored_payload(Config, Second)).

tier_server_that_was_asked_ends(Config) ->
    {ok, First} = save(meta([1])),
    ok = gen_server:stop(?TIER),
    ok = erllama_fake:forget_calls(),
    ?assertExit({noproc, {gen_server, call, [?TIER, dir]}}, save(meta([2]))),
    ?assertEqual([reserve_save, dir, cancel_reservation], calls_but_the_check()),
    ?assertExit({noproc, {gen_server, call, [?TIER, dir]}}, ?READER:load(?TIER, First)),
    assert_only(file_of(?config(root, Config), First), Config).

%% It may have another root.
restarted_tier_server_is_asked(Config) ->
    {ok, First} = save(meta([1])),
    Other = other_root(Config),
    ok = restart_tier_server(Other),
    [Second, Third] = [Key || N <- [2, 3], {ok, Key} <- [save(meta([N]))]],
    ?assertEqual([[?TIER], [?TIER]], args(dir)),
    ?assertEqual(lists:sort([filename:basename(file_of(Other, K)) || K <- [Second, Third]]),
                 files(Other)),
    ?assertMatch({ok, _, ?PAYLOAD}, ?READER:load(?TIER, Third)),
    ?assertEqual(miss, ?READER:load(?TIER, First)).

%% The server answers, and another one has its name before the answer is here.
root_is_not_kept_across_a_restart(Config) ->
    Other = other_root(Config),
    ok = erllama_fake:script(dir, [
        {instead, fun([?TIER]) ->
            Root = gen_server:call(?TIER, dir),
            ok = restart_tier_server(Other),
            Root
        end}
    ]),
    {ok, _} = save(meta([1])),
    {ok, Second} = save(meta([2])),
    {ok, Third} = save(meta([3])),
    ?assertEqual(lists:sort([filename:basename(file_of(Other, K)) || K <- [Second, Third]]),
                 files(Other)),
    ?assertEqual([[?TIER], [?TIER]], args(dir)).

%% There was no server before it was asked, so it may be another's answer too.
root_is_not_kept_across_a_start(Config) ->
    ok = gen_server:stop(?TIER),
    ok = erllama_fake:script(dir, [
        {before, fun([?TIER]) -> ?DISK_SRV:start(?TIER, ?config(root, Config)) end}
    ]),
    [?assertMatch({ok, _}, save(meta([N]))) || N <- [1, 2, 3]],
    ?assertEqual([[?TIER], [?TIER]], args(dir)).

%% Below the first one, so that its files are judged as well.
other_root(Config) ->
    Other = filename:join(?config(root, Config), "other"),
    ok = file:make_dir(Other),
    Other.

%%% What can fail

tier_server_is_not_there(Config) ->
    ok = gen_server:stop(?TIER),
    ?assertExit({noproc, {gen_server, call, [?TIER, dir]}}, save()),
    ?assertEqual([reserve_save, dir, cancel_reservation], calls_but_the_check()),
    assert_nothing_left(Config).

%% It is reading what others load, and nobody has asked it before.
tier_server_is_busy(Config) ->
    ok = script_busy(),
    ok = sys:suspend(?TIER),
    ?assertEqual({{error, tier_busy}, []}, ask(actor(), fun() -> {save(), own_messages()} end)),
    ok = sys:resume(?TIER),
    ?assertEqual([reserve_save, dir, cancel_reservation], calls_but_the_check()),
    assert_nothing_left(Config),
    ?assertMatch({ok, _}, save()).

%% The key is somebody else's by now, and so is the reservation.
reservation_expires_while_writing(Config) ->
    Self = self(),
    Other = actor(),
    ok = erllama_fake:script(check_reservation, [
        {before, fun([Key, _Token]) ->
            ok = ?META_SRV:expire(Key),
            {ok, _} = ask(Other, fun() -> ?META_SRV:reserve_save(Key, disk, self()) end),
            Self ! {key, Key}
        end}
    ]),
    Root = ?config(root, Config),
    ?assertEqual(
        {{error, expired}, []}, ask(untidy_actor(), fun() -> {save(), open_files(Root)} end)
    ),
    Key = receive {key, K} -> K after 0 -> error(not_checked) end,
    ?assertEqual(
        [reserve_save, dir, check_reservation, reserve_save], calls_after_the_key()
    ),
    ?assertMatch([{Key, _}], ?META_SRV:reserved()),
    [{Key, Theirs}] = ?META_SRV:reserved(),
    ok = ?META_SRV:cancel_reservation(Key, Theirs),
    assert_nothing_left(Config).

reservation_expires_before_mark_published(Config) ->
    expires_after_publishing(mark_published, [mark_published], Config).

reservation_expires_before_announce_saved(Config) ->
    expires_after_publishing(announce_saved, [mark_published, announce_saved], Config).

%% The file stays, for the host to find it, but it is no success.
expires_after_publishing(Call, Calls, Config) ->
    ok = erllama_fake:script(Call, [{before, fun([Key | _]) -> ok = ?META_SRV:expire(Key) end}]),
    ?assertEqual({error, expired}, save()),
    ?assertEqual([reserve_save, dir, check_reservation | Calls], calls_after_the_key()),
    ?assertEqual(#{}, erllama_cache_counters:all()),
    Root = ?config(root, Config),
    [[Key, _, Path]] = args(mark_published),
    ?assertEqual([filename:basename(Path)], files(Root)),
    ?assertEqual(?PAYLOAD, stored_payload(Config, Key)),
    ok = nothing_open(Root),
    ?assertEqual(0, ?WRITER:current()).

%% Whatever a call raises is raised to the caller, and leaves nothing behind.
host_raises(Config) ->
    [
        raises(Call, Class, Config)
     || Call <- host_calls() ++ [cancel_reservation], Class <- [error, exit, throw]
    ].

raises(Call, Class, Config) ->
    Root = ?config(root, Config),
    Reason = {raised_by, Call},
    ok = erllama_fake:forget_calls(),
    ok = restart_tier_server(),
    ok = erllama_fake:script(Call, [{raise, Class, Reason}]),
    %% Only a save that fails cancels anything.
    [ok = script_failure() || Call =:= cancel_reservation],
    Actor = untidy_actor(),
    ?assertException(Class, Reason, ask(Actor, fun() -> save() end)),
    ?assertEqual({Call, Class, 0}, {Call, Class, ?WRITER:current()}),
    ?assertEqual({Call, Class, []}, {Call, Class, open_files(Root)}),
    Published = lists:member(Call, [mark_published, announce_saved, incr]),
    ?assertEqual({Call, Class, Published}, {Call, Class, files(Root) =/= []}),
    Cancels = lists:member(Call, [dir, check_reservation, cancel_reservation]),
    ?assertEqual({Call, Class, Cancels}, {Call, Class, lists:member(cancel_reservation, calls())}),
    Kept = lists:member(Call, [mark_published, announce_saved, cancel_reservation]),
    ?assertEqual({Call, Class, Kept}, {Call, Class, ?META_SRV:reserved() =/= []}),
    kill(Actor),
    eventually(fun() -> ?META_SRV:reserved() =:= [] end),
    %% The same save goes well now: it adopts its own file where there is one.
    ok = restart_tier_server(),
    [ok = ?META_SRV:forget(Key) || Key <- ?META_SRV:stored()],
    ?assertMatch({ok, _}, save()),
    [ok = ?META_SRV:forget(Key) || Key <- ?META_SRV:stored()],
    [ok = file:delete(filename:join(Root, File)) || File <- files(Root)].

owner_dies_in_a_call_to_the_host(Config) ->
    Root = ?config(root, Config),
    Self = self(),
    Block = {before, fun(_Args) -> Self ! {blocked, self()}, receive never -> ok end end},
    [
        begin
            ok = restart_tier_server(),
            ok = erllama_fake:script(Call, [Block]),
            %% Only a save that fails cancels anything.
            [ok = script_failure() || Call =:= cancel_reservation],
            Owner = actor(),
            _ = tell(Owner, fun() -> save() end),
            receive {blocked, Owner} -> ok after 20000 -> error({not_called, Call}) end,
            ?assertEqual({Call, 1}, {Call, ?WRITER:current()}),
            kill(Owner),
            eventually(fun() -> ?WRITER:current() =:= 0 end),
            eventually(fun() -> open_files(Root) =:= [] end),
            eventually(fun() -> ?META_SRV:reserved() =:= [] end),
            %% Before it is marked as published, the host knows nothing of it, whatever is there.
            Published = lists:member(Call, [mark_published, announce_saved, incr]),
            ?assertEqual({Call, Published}, {Call, files(Root) =/= []}),
            Known = lists:member(Call, [announce_saved, incr]),
            ?assertEqual({Call, Known}, {Call, ?META_SRV:stored() =/= []}),
            %% The root that made a save fail is another server's.
            ok = restart_tier_server(),
            case save() of
                {ok, _} -> ?assertNot(Known);
                {error, already_present} -> ?assert(Known)
            end,
            [ok = ?META_SRV:forget(Key) || Key <- ?META_SRV:stored()],
            [ok = file:delete(filename:join(Root, File)) || File <- files(Root)]
        end
     || Call <- host_calls() ++ [cancel_reservation]
    ].

%%% Leases

%% Two save one key at the same time.
second_saver_meets_a_conflict(Config) ->
    Second = actor(),
    Self = self(),
    ok = erllama_fake:script(check_reservation, [
        {before, fun(_Args) -> Self ! {second, ask(Second, fun() -> save() end)} end}
    ]),
    {ok, Key} = save(),
    ?assertEqual({error, conflict}, receive {second, Result} -> Result after 0 -> none end),
    ?assertEqual({error, already_present}, ask(Second, fun() -> save() end)),
    ?assertEqual(#{4 => 1, ?DUPLICATE_DROPPED => 1}, erllama_cache_counters:all()),
    assert_only(file_of(?config(root, Config), Key), Config).

%% The host may not have been told of the death yet.
key_of_a_dead_saver_is_free_at_once(Config) ->
    Self = self(),
    Block = {before, fun(_Args) -> Self ! blocked, receive never -> ok end end},
    ok = erllama_fake:script(check_reservation, [Block]),
    First = actor(),
    _ = tell(First, fun() -> save(meta(), <<"the dead one's">>) end),
    receive blocked -> ok end,
    ok = sys:suspend(?META_SRV),
    kill(First),
    Second = actor(),
    Saving = tell(Second, fun() -> save() end),
    ok = sys:resume(?META_SRV),
    {ok, Key} = answer(Second, Saving),
    ?assertEqual(?PAYLOAD, stored_payload(Config, Key)),
    assert_only(file_of(?config(root, Config), Key), Config).

%% Nothing is reserved before there is a slot, so that no lease can run out in the queue.
time_in_the_queue_is_no_time_of_a_lease(_Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    Actor = actor(),
    Saving = tell(Actor, fun() -> save() end),
    eventually(fun() -> waiting() =:= [Actor] end),
    ok = ?META_SRV:advance(10 * ?LEASE),
    ?assertEqual([], ?META_SRV:reserved()),
    ok = ?WRITER:release(),
    ?assertMatch({ok, _}, answer(Actor, Saving)).

%% Another process takes the key over and saves it, while this one is about to publish.
regranted_before_publishing(Config) ->
    [
        begin
            {Mine, Theirs, Key} = regranted_at(check_reservation, Payload),
            ?assertEqual({{error, expired}, {ok, Key}}, {Mine, Theirs}),
            ?assertEqual(<<"theirs">>, stored_payload(Config, Key)),
            ?assertNot(lists:member(cancel_reservation, calls())),
            regranted_is_over(Key, Config)
        end
     || Payload <- [<<"ours">>, binary:copy(<<"ours">>, 30000)]
    ].

%% The other one finds the file and adopts it: it is told of once, by the one who has the key.
regranted_after_publishing(Config) ->
    {Mine, Theirs, Key} = regranted_at(mark_published, <<"ours">>),
    ?assertEqual({{error, expired}, {ok, Key}}, {Mine, Theirs}),
    ?assertEqual(<<"ours">>, stored_payload(Config, Key)),
    regranted_is_over(Key, Config).

regranted_before_announcing(Config) ->
    {Mine, Theirs, Key} = regranted_at(announce_saved, <<"ours">>),
    ?assertEqual({{error, expired}, {ok, Key}}, {Mine, Theirs}),
    ?assertEqual(<<"ours">>, stored_payload(Config, Key)),
    [[Key, Lost | _], [Key, Valid | _]] = args(announce_saved),
    ?assertNotEqual(Lost, Valid),
    regranted_is_over(Key, Config).

%% What two savers of one key are told, the second of whom is granted it when the first makes this
%% call.
regranted_at(Call, Payload) ->
    ok = erllama_fake:forget_calls(),
    Self = self(),
    Second = actor(),
    TakeOver = fun([Key | _]) ->
        ok = ?META_SRV:expire(Key),
        Self ! {theirs, Key, ask(Second, fun() -> save(meta(), <<"theirs">>) end)}
    end,
    ok = erllama_fake:script(Call, [{before, TakeOver}]),
    Mine = save(meta(), Payload),
    receive
        {theirs, Key, Theirs} -> {Mine, Theirs, Key}
    after 0 -> error({not_called, Call})
    end.

regranted_is_over(Key, Config) ->
    ?assertEqual([Key], ?META_SRV:stored()),
    ?assertEqual(#{4 => 1}, erllama_cache_counters:all()),
    assert_only(file_of(?config(root, Config), Key), Config),
    ?assertMatch({ok, #{key := Key}, _}, ?DISK_SRV:load(?TIER, Key)),
    ok = file:delete(file_of(?config(root, Config), Key)),
    ok = ?META_SRV:forget(Key),
    ok = erllama_cache_counters:reset().

%% It asks for the key while that is being saved, and finds the file when it is answered.
turn_that_follows_waits_for_the_announcement(_Config) ->
    {Follower, Following} = follows_a_save(100000),
    [ok = erllama_fake:script(Call, [
        {before, fun([Key | _]) -> [Key] = ?META_SRV:waiting() end}
    ]) || Call <- [check_reservation, mark_published, announce_saved]],
    {ok, Key} = save(),
    ?assertMatch({stored, {ok, #{key := Key}, ?PAYLOAD}}, answer(Follower, Following)).

%% It sits out its time.
failure_answers_nobody_who_waits(Config) ->
    {Follower, Following} = follows_a_save(2000),
    ok = erllama_fake:script(check_reservation, [
        {before, fun([Key | _]) -> ok = ?META_SRV:expire(Key) end}
    ]),
    ?assertEqual({error, expired}, save()),
    ?assertEqual({miss, miss}, answer(Follower, Following)),
    ?assertEqual([], files(?config(root, Config))).

%% A process that asks for the key of the next save as soon as that is reserved.
follows_a_save(Timeout) ->
    Follower = actor(),
    Following = tell(Follower, fun() ->
        receive
            {reserved, Key} -> {?META_SRV:await(Key, Timeout), ?DISK_SRV:load(?TIER, Key)}
        end
    end),
    ok = erllama_fake:script(dir, [
        {before, fun(_Args) ->
            [{Key, _Token}] = ?META_SRV:reserved(),
            Follower ! {reserved, Key},
            eventually(fun() -> ?META_SRV:waiting() =:= [Key] end)
        end}
    ]),
    {Follower, Following}.

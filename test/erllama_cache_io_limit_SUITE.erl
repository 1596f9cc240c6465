%% A save whose slices wait for their turn on the dirty schedulers, or take long: its lease is
%% renewed meanwhile, and without it nothing is published. That no scheduler is held for long is in
%% erllama_cache_schedulers_tests.
-module(erllama_cache_io_limit_SUITE).

-include("erllama_cache_erllama_util.hrl").
-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-compile(export_all).

%% Milliseconds.
-define(LEASE, 60000).

-import(erllama_cache_test_util, [
    files/1, open_files/1, file_of/2, eventually/1, actor/0, ask/2, tell/2, answer/2
]).
-import(erllama_cache_erllama_util, [
    meta/0, meta/1, start_writer/1, save/0, save/2, untidy_actor/0, args/1, on_peer/2
]).
-import(erllama_cache_hooked_host, [hold_turns/0, next_turn/1, go_on/1, waits_for_a_turn/1]).

suite() ->
    erllama_cache_erllama_util:suite().

all() ->
    erllama_cache_erllama_util:all().

groups() ->
    erllama_cache_erllama_util:groups([
        lease_is_renewed_while_it_writes,
        lease_is_renewed_while_it_waits_for_its_turn,
        key_lost_while_it_waits_for_its_turn
    ]).

%% A save asks between its slices, if its last question was long enough ago: here that is at once.
%% So it does between those in which it checks a file that has its name already.
lease_is_renewed_while_it_writes(Config) ->
    Root = ?config(root, Config),
    on_peer(["erl"], fun() ->
        ok = on_a_fresh_node(Root, 0),
        save_in_many_slices(Root, 64 * 1024 * 1024)
    end).

save_in_many_slices(Root, Bytes) ->
    {Key, Writing} = late_questions(<<0:Bytes/unit:8>>),
    ok = ?META_SRV:forget(Key),
    {Key, Checking} = late_questions(<<0:(100000 * 8)>>),
    %% It would take the oracle minutes.
    ?assertMatch({ok, #{size := Size}, _} when Size > Bytes,
                 erllama_fake_kvc:look(file_of(Root, Key))),
    ok = file:delete(file_of(Root, Key)),
    ok = ?META_SRV:forget(Key),
    %% Each asks once more, before it publishes.
    case Writing > 2 andalso Checking > 1 of
        true -> ok;
        %% It takes one slice only, on a machine that is fast.
        false when Bytes < 1 bsl 29 -> save_in_many_slices(Root, 2 * Bytes)
    end.

%% How often a save asks when each question comes late, but in time.
late_questions(Payload) ->
    ok = erllama_fake:forget_calls(),
    Late = {before, fun(_Args) -> ok = ?META_SRV:advance(?LEASE - 20000) end},
    ok = erllama_fake:script(check_reservation, lists:duplicate(1000, Late)),
    {ok, Key} = save(meta(), Payload),
    {Key, length(args(check_reservation))}.

%% As long as others have all the turns on the dirty schedulers, whose disk is slow.
lease_is_renewed_while_it_waits_for_its_turn(Config) ->
    Root = ?config(root, Config),
    on_peer(["erl"], fun() -> save_waits_for_turns(Root) end).

save_waits_for_turns(Root) ->
    ok = on_a_fresh_node(Root, 1),
    [
        begin
            Saver = actor(),
            Turns = hold_turns(),
            Saving = tell(Saver, fun() -> save(meta([byte_size(Payload)]), Payload) end),
            %% The last of these waits is for its publication, if it is not a small save.
            After = turns_pass(Waits, Saver, Turns, fun() ->
                [ok = time_passes_and_it_asks() || _ <- [1, 2, 3]]
            end),
            ?assertMatch({ok, _}, answer(Saver, Saving)),
            ok = go_on(After)
        end
     || {Payload, Waits} <- [{?PAYLOAD, 1}, {<<0:(100000 * 8)>>, 2}]
    ],
    ok.

%% So many turns are given to this saver, each after this was done while it waited.
turns_pass(0, _Saver, Held, _Meanwhile) ->
    Held;
turns_pass(Turns, Saver, Held, Meanwhile) ->
    ok = waits_for_a_turn(Saver),
    _ = Meanwhile(),
    turns_pass(Turns - 1, Saver, next_turn(Held), Meanwhile).

time_passes_and_it_asks() ->
    ok = ?META_SRV:advance(?LEASE - 20000),
    Asked = length(args(check_reservation)),
    eventually(fun() -> length(args(check_reservation)) > Asked end).

%% Nothing is published without the reservation, however late the turn comes.
key_lost_while_it_waits_for_its_turn(Config) ->
    Root = ?config(root, Config),
    on_peer(["erl"], fun() -> save_loses_its_key_in_line(Root) end).

save_loses_its_key_in_line(Root) ->
    ok = on_a_fresh_node(Root, 1),
    [
        begin
            [Saver, Other] = [untidy_actor(), actor()],
            Turns = hold_turns(),
            Saving = tell(Saver, fun() -> {save(meta(), Payload), open_files(Root)} end),
            Held = turns_pass(Waits, Saver, Turns, fun() -> ok end),
            ok = waits_for_a_turn(Saver),
            [{Key, _}] = ?META_SRV:reserved(),
            ok = ?META_SRV:expire(Key),
            {ok, Theirs} = ask(Other, fun() -> ?META_SRV:reserve_save(Key, disk, self()) end),
            %% The turns are still held.
            ?assertEqual({{error, expired}, []}, answer(Saver, Saving)),
            ?assertEqual([], files(Root)),
            ?assertEqual([{Key, Theirs}], ?META_SRV:reserved()),
            ok = go_on(Held),
            ?assertEqual({0, []}, {?WRITER:current(), files(Root)}),
            ok = ?META_SRV:cancel_reservation(Key, Theirs),
            ?assertMatch({ok, Key}, ask(Saver, fun() -> save() end)),
            ok = ?META_SRV:forget(Key),
            ok = file:delete(file_of(Root, Key))
        end
     || {Payload, Waits} <- [{?PAYLOAD, 0}, {<<0:(100000 * 8)>>, 0}, {<<0:(100000 * 8)>>, 1}]
    ],
    ok.

%% Host and writer on a node where a save asks after this many milliseconds whether its reservation
%% still stands, and not after 15 s.
on_a_fresh_node(Root, Ms) ->
    {ok, _} = application:ensure_all_started(crypto),
    ok = erllama_cache_erllama_util:renew_every(Ms),
    ok = erllama_fake:start(?TIER, Root),
    _ = start_writer(?LIMIT),
    ok.

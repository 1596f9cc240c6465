%% The rows of the built-in store's index: reservations, their leases and their owners.
-module(erllama_cache_index_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

%% What a save tells of a file with one token.
-define(CONTENT, {tokens, <<1:32/little>>, 0}).

-import(erllama_cache_store_util, [
    corrupt_payload/1, die_published/2, in_process/1, in_processes/2, key/1, meta/1,
    none_reserved/1, reserve/2, save/3, start_owner/1, watches/1, with_store/2, with_two_stores/2,
    save/2
]).
-import(erllama_cache_test_util, [ask/2, kill/1, eventually/1, file_of/2, files/1]).

index_test_() ->
    erllama_cache_store_util:store_tests([
        fun a_reserved_key_is_a_conflict/1,
        fun one_of_many_savers_of_a_key_wins/1,
        fun a_dead_owner_frees_its_key/1,
        fun a_dead_owner_leaves_a_published_file/1,
        fun a_dead_owner_leaves_no_bad_file/1,
        fun a_killed_saver_leaves_nothing_half/1,
        fun an_ended_lease_stands_until_taken/1,
        fun a_load_leaves_reservations_alone/1,
        fun a_lease_that_was_taken_over_leaves_no_watch/1,
        fun a_check_beside_loads_does_not_expire/1,
        fun a_start_leaves_reservations_alone/1,
        fun a_store_that_is_being_made_is_not_there/1,
        fun a_look_for_files_to_evict_leaves_pinned_ones_out/1
    ]).

%% As between the end of a store and its next start, for who has met the one and finds the other.
a_store_that_is_being_made_is_not_there(_Root) ->
    Name = index_being_made,
    Name = ets:new(Name, [named_table, public]),
    ?assertExit({noproc, _}, erllama_cache_index:config(Name)),
    ?assertExit({noproc, _}, erllama_cache_index:length_counts(Name)),
    true = ets:delete(Name).

%% Else a thousand of them would hide all others.
a_look_for_files_to_evict_leaves_pinned_ones_out(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        [Pinned, Other] = [erllama_cache_store_util:save(Store, N) || N <- [1, 2]],
        ok = erllama_cache_store:pin(Store, Pinned),
        ?assertMatch([{_, Other}], erllama_cache_index:lowest(Store, 1000)),
        ok = erllama_cache_store:unpin(Store, Pinned),
        ?assertMatch([_, _], erllama_cache_index:lowest(Store, 1000))
    end).

a_reserved_key_is_a_conflict(Root) ->
    _ = [
        with_store(#{root => Root, max_bytes => MaxBytes}, fun(Store) ->
            {Owner, {ok, Token}} = start_owner(fun() -> reserve(Store, key(1)) end),
            ?assertEqual(
                {error, conflict}, erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD)
            ),
            %% Not even for the owner itself, and nobody else's business.
            ?assertEqual({error, conflict}, ask(Owner, fun() -> reserve(Store, key(1)) end)),
            Other = save(Store, 2),
            ok = ask(Owner, fun() -> erllama_cache_store:cancel(Store, key(1), Token) end),
            Key = save(Store, 1),
            _ = [ok = erllama_cache_store:delete(Store, K) || K <- [Key, Other]],
            kill(Owner)
        end)
     || MaxBytes <- [infinity, 1 bsl 20]
    ].

one_of_many_savers_of_a_key_wins(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Results = in_processes(20, fun(N) ->
            {N, erllama_cache_writer:save(Store, disk, meta(1), <<N>>)}
        end),
        Key = key(1),
        ?assertMatch([_], [N || {N, {ok, K}} <- Results, K =:= Key]),
        [{Winner, _}] = [Result || {_, {ok, _}} = Result <- Results],
        Others = lists:usort([Result || {N, Result} <- Results, N =/= Winner]),
        ?assertEqual([], Others -- [{error, already_present}, {error, conflict}]),
        ?assertMatch({ok, _, <<Winner>>}, erllama_cache_store:load(Store, Key)),
        ?assertMatch(#{files := 1, reservations := 0}, erllama_cache_store:info(Store))
    end).

a_dead_owner_frees_its_key(Root) ->
    _ = [
        with_store(#{root => Root, max_bytes => MaxBytes}, fun(Store) ->
            {Owner, {ok, Token}} = start_owner(fun() -> reserve(Store, key(1)) end),
            ?assertMatch(#{reservations := 1}, erllama_cache_store:info(Store)),
            kill(Owner),
            none_reserved(Store),
            ?assertEqual({error, expired}, erllama_cache_store:check(Store, key(1), Token)),
            ok = erllama_cache_store:delete(Store, save(Store, 1))
        end)
     || MaxBytes <- [infinity, 1 bsl 20]
    ],
    %% A key is free at once, whether the server has heard of the death or not.
    with_store(#{root => Root}, fun(Store) ->
        ok = sys:suspend(Store),
        {ok, _} = in_process(fun() -> reserve(Store, key(1)) end),
        Key = save(Store, 1),
        ok = sys:resume(Store),
        %% Now it hears of it, and leaves the file that is not the dead owner's.
        _ = sys:get_state(Store),
        ?assertMatch(#{files := 1, reservations := 0}, erllama_cache_store:info(Store)),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key))
    end).

a_dead_owner_leaves_a_published_file(Root) ->
    with_two_stores(Root, fun(Store, Other) ->
        Key = save(Other, 1),
        ok = die_published(Store, Key),
        eventually(fun() -> maps:get(files, erllama_cache_store:info(Store)) =:= 1 end),
        Size = filelib:file_size(file_of(Root, Key)),
        ?assertMatch(#{bytes := Size, reservations := 0}, erllama_cache_store:info(Store)),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key))
    end).

a_dead_owner_leaves_no_bad_file(Root) ->
    with_two_stores(Root, fun(Store, Other) ->
        Key = save(Other, 1),
        corrupt_payload(file_of(Root, Key)),
        ok = die_published(Store, Key),
        ok = die_published(Store, <<0:256>>),
        none_reserved(Store),
        ?assertMatch(#{files := 0}, erllama_cache_store:info(Store)),
        ?assertEqual(Key, save(Store, 1)),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key))
    end).

%% Killed while it writes: its reservation and its slot come back, and what stands in the root, if
%% the kill came too late, is a whole file.
a_killed_saver_leaves_nothing_half(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Payload = binary:copy(rand:bytes(1 bsl 20), 64),
        Saver = spawn(fun() -> save(Store, 1, Payload) end),
        eventually(fun() -> maps:get(reservations, erllama_cache_store:info(Store)) =:= 1 end),
        kill(Saver),
        none_reserved(Store),
        eventually(fun() -> erllama_cache_writer:current() =:= 0 end),
        case files(Root) of
            [] ->
                ?assertEqual(miss, erllama_cache_store:load(Store, key(1)));
            [Name] ->
                ?assertEqual(filename:basename(file_of(Root, key(1))), Name),
                {ok, _, Loaded} = erllama_cache_store:load(Store, key(1)),
                ?assert(Loaded =:= Payload)
        end
    end).

an_ended_lease_stands_until_taken(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = key(1),
        {ok, Token} = reserve(Store, Key),
        erllama_cache_index:end_lease(Store, Key),
        ?assertEqual(ok, erllama_cache_store:check(Store, Key, Token)),
        ?assertEqual({error, conflict}, in_process(fun() -> reserve(Store, Key) end)),
        erllama_cache_index:end_lease(Store, Key),
        ?assertEqual(ok, erllama_cache_store:mark_published(Store, Key, Token, "path")),
        ?assertEqual({error, conflict}, in_process(fun() -> reserve(Store, Key) end)),

        erllama_cache_index:end_lease(Store, Key),
        {Owner, {ok, Taken}} = start_owner(fun() -> reserve(Store, Key) end),
        Expired = {error, expired},
        ?assertEqual(Expired, erllama_cache_store:check(Store, Key, Token)),
        ?assertEqual(Expired, erllama_cache_store:mark_published(Store, Key, Token, "path")),
        ?assertEqual(Expired, erllama_cache_store:announce(Store, Key, Token, 1, <<>>, ?CONTENT)),
        ?assertEqual(ok, erllama_cache_store:cancel(Store, Key, Token)),
        ?assertEqual(ok, erllama_cache_store:check(Store, Key, Taken)),
        kill(Owner)
    end).

%% A file is there before it is announced, and another node may have made it: a load that finds it
%% says nothing about the reservation.
a_load_leaves_reservations_alone(Root) ->
    with_two_stores(Root, fun(Store, Other) ->
        Key = save(Other, 1),
        {ok, Token} = reserve(Store, Key),
        {ok, _, _} = erllama_cache_store:load(Store, Key),
        ?assertEqual(ok, erllama_cache_store:check(Store, Key, Token)),
        {ok, _, _} = erllama_cache_store:load(Store, Key),
        ?assertEqual(ok, erllama_cache_store:mark_published(Store, Key, Token, "path")),
        {ok, _, _} = erllama_cache_store:load(Store, Key),
        ?assertEqual(ok, erllama_cache_store:announce(Store, Key, Token, 1, <<>>, ?CONTENT)),
        ?assertMatch(#{files := 1, reservations := 0}, erllama_cache_store:info(Store))
    end).

%% Whoever dies first, the one who lost the key or the one who has it.
a_lease_that_was_taken_over_leaves_no_watch(Root) ->
    _ = [
        with_store(#{root => Root, max_bytes => MaxBytes}, fun(Store) ->
            {Loser, {ok, _}} = start_owner(fun() -> reserve(Store, key(1)) end),
            %% In an unbounded store the server hears of a reservation later.
            eventually(fun() -> watches(Store) =:= 1 end),
            erllama_cache_index:end_lease(Store, key(1)),
            {Winner, {ok, Token}} = start_owner(fun() -> reserve(Store, key(1)) end),
            eventually(fun() -> watches(Store) =:= 1 end),
            case Dies of
                loser ->
                    kill(Loser),
                    ok = ask(Winner, fun() -> erllama_cache_store:check(Store, key(1), Token) end),
                    eventually(fun() -> watches(Store) =:= 1 end),
                    kill(Winner);
                winner ->
                    kill(Winner),
                    none_reserved(Store),
                    eventually(fun() -> watches(Store) =:= 0 end),
                    kill(Loser)
            end,
            none_reserved(Store),
            eventually(fun() -> watches(Store) =:= 0 end),
            %% And who has announced a file may die as well.
            {Saver, {ok, _}} = start_owner(fun() ->
                erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD)
            end),
            kill(Saver),
            ok = erllama_cache_store:delete(Store, key(1))
        end)
     || MaxBytes <- [infinity, 1 bsl 20], Dies <- [loser, winner]
    ].

%% Loads note their uses in the row of a reservation too, and a check that renews the lease changes
%% the same row.
a_check_beside_loads_does_not_expire(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = key(1),
        {ok, Token} = reserve(Store, Key),
        Loader = spawn(fun() -> note_uses(Store, Key) end),
        Checked = [
            begin
                erllama_cache_index:end_lease(Store, Key),
                erllama_cache_store:check(Store, Key, Token)
            end
         || _ <- lists:seq(1, 5000)
        ],
        kill(Loader),
        ?assertEqual([ok], lists:usort(Checked)),
        ok = erllama_cache_store:cancel(Store, Key, Token)
    end).

note_uses(Store, Key) ->
    Now = erlang:system_time(millisecond),
    _ = erllama_cache_index:use(Store, Key, Now, Now),
    note_uses(Store, Key).

%% A store that starts can be saved to before it has looked through its root.
a_start_leaves_reservations_alone(Root) ->
    Key = with_store(#{root => Root}, fun(Store) -> save(Store, 1) end),
    Turns = erllama_cache_hooked_host:all_turns(),
    ok = erllama_cache_hooked_host:taken(Turns),
    Test = self(),
    Starter = spawn_link(fun() ->
        with_store(#{root => Root}, fun(_Store) ->
            Test ! started,
            receive stop -> ok end
        end)
    end),
    eventually(fun() -> is_pid(whereis(?STORE)) end),
    ok = erllama_cache_hooked_host:waits_for_a_turn(whereis(?STORE)),
    {ok, Token} = reserve(?STORE, Key),
    ok = erllama_cache_hooked_host:go_on(Turns),
    receive started -> ok end,
    ?assertEqual(ok, erllama_cache_store:check(?STORE, Key, Token)),
    ?assertEqual({error, conflict}, in_process(fun() -> reserve(?STORE, Key) end)),
    Size = filelib:file_size(file_of(Root, Key)),
    ?assertEqual(ok, erllama_cache_store:announce(?STORE, Key, Token, Size, <<>>, ?CONTENT)),
    ?assertMatch(#{files := 1, bytes := Size}, erllama_cache_store:info(?STORE)),
    Monitor = monitor(process, Starter),
    Starter ! stop,
    receive {'DOWN', Monitor, process, Starter, normal} -> ok end.

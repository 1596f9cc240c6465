%% A bounded store: what it evicts, and that its room is neither given twice nor lost.
-module(erllama_cache_evict_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_store_util, [
    bytes_in/1, die_published/2, in_process/1, in_processes/2, is_known/2, its_books_balance/2,
    key/1, meta/1, none_reserved/1, reserve/2, start_owner/1, with_store/2, with_store/3
]).
-import(erllama_cache_test_util, [kill/1, eventually/1, file_of/2, files/1, next_millisecond/0]).

-define(BIG, 10000).
%% A file with a payload of ?BIG bytes and nothing optional.
-define(ROOM, (?BIG + 222)).

eviction_test_() ->
    erllama_cache_store_util:store_tests([
        fun the_least_recently_used_file_is_evicted/1,
        fun a_file_above_the_bound_is_refused/1,
        fun reserved_room_is_not_given_twice/1,
        fun room_comes_back/1,
        fun a_start_makes_room/1,
        fun many_savers_stay_within_the_bound/1,
        fun two_bounded_stores_share_a_root/1,
        fun hits_of_a_file_count_at_a_start/1,
        fun what_is_to_stay_free_makes_files_go/1,
        fun what_another_node_uses_does_not_expire/1,
        fun a_load_by_a_process_that_ends_is_entered/1
    ]).

the_least_recently_used_file_is_evicted(Root) ->
    with_store(#{root => Root, max_bytes => 4 * ?ROOM}, fun(Store) ->
        _ = [save_big(Store, N) || N <- [1, 2, 3, 4]],
        ?assertEqual([1, 2, 3, 4], stored(Root, 6)),
        _ = save_big(Store, 5),
        ?assertEqual([2, 3, 4, 5], stored(Root, 6)),
        %% 2 and 3 are next, by the server's last look: it has to see that 2 was used since.
        {ok, _, _} = erllama_cache_store:load(Store, key(2)),
        _ = save_big(Store, 6),
        ?assertEqual([2, 4, 5, 6], stored(Root, 6)),
        ?assertEqual(miss, erllama_cache_store:load(Store, key(3))),
        ?assertMatch(#{files := 4, evictions := 2}, erllama_cache_store:info(Store)),
        %% A second save of a key that is stored makes no room.
        {error, already_present} = erllama_cache_writer:save(Store, disk, big_meta(2), <<>>),
        ?assertEqual([2, 4, 5, 6], stored(Root, 6))
    end).

%% Saved before, used a few times, and so behind one that was saved later.
hits_of_a_file_count_at_a_start(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        [{ok, _} = erllama_cache_store:save(Store, (big_meta(N))#{hit_count => Hits}, big_payload())
         || {N, Hits} <- [{1, 3}, {2, 0}, {3, 9}]]
    end),
    Options = #{root => Root, max_bytes => 2 * ?ROOM, eviction => frecency},
    with_store(Options, fun(Store) ->
        ?assertEqual([1, 3], stored(Root, 3)),
        _ = save_big(Store, 4),
        ?assertEqual([3, 4], stored(Root, 4))
    end).

%% How much is free is nothing that a test decides on: less than 1 byte never, that much always.
what_is_to_stay_free_makes_files_go(Root) ->
    with_store(#{root => Root, min_free_bytes => 1}, fun(Store) ->
        _ = [save_big(Store, N) || N <- [1, 2]],
        ?assertMatch(#{files := 2, evictions := 0}, erllama_cache_store:info(Store))
    end),
    with_store(#{root => Root}, fun(Store) ->
        ok = erllama_cache_store:pin(Store, key(1)),
        ?assertMatch(#{files := 2, pinned := 1}, erllama_cache_store:info(Store))
    end),
    with_store(#{root => Root, min_free_bytes => 1 bsl 60}, fun(Store) ->
        ?assertEqual({error, no_room}, erllama_cache_store:save(Store, big_meta(3), big_payload())),
        %% Nothing goes where all of it would not do.
        ?assertEqual([1, 2], stored(Root, 2))
    end).

%% By what the file says, which is noted there by whoever uses it.
what_another_node_uses_does_not_expire(Root) ->
    Path = unicode:characters_to_binary(Root),
    Note = fun(Key, At) -> ok = erllama_cache_nif:note_use(Path, Key, 1, At) end,
    with_store(#{root => Root, ttl => 2500}, fun(Store) ->
        [Used, Left, Wrong] = [save_big(Store, N) || N <- [1, 2, 3]],
        %% By a clock that is an hour ahead: nobody knows when that was.
        Note(Wrong, erlang:system_time(second) + 3600),
        eventually(fun() ->
            Note(Used, erlang:system_time(second)),
            not lists:any(fun(Key) -> erllama_cache_store:member(Store, Key) end, [Left, Wrong])
        end),
        ?assert(erllama_cache_store:member(Store, Used)),
        %% A file that has gone is counted right after that.
        eventually(fun() -> map_get(expired, erllama_cache_store:info(Store)) =:= 2 end)
    end).

a_file_above_the_bound_is_refused(Root) ->
    with_store(#{root => Root, max_bytes => ?ROOM}, fun(Store) ->
        Key = save_big(Store, 1),
        ?assertEqual(
            {error, exceeds_max_bytes},
            erllama_cache_writer:save(Store, disk, big_meta(2), <<0:((?BIG + 1) * 8)>>)
        ),
        ?assertMatch({ok, _, _}, erllama_cache_store:load(Store, Key)),
        ?assertMatch(#{evictions := 0}, erllama_cache_store:info(Store))
    end).

%% Room that a running save takes is no more to be had than that of a file; files make way for it.
reserved_room_is_not_given_twice(Root) ->
    with_store(#{root => Root, max_bytes => 2 * ?ROOM}, fun(Store) ->
        _ = save_big(Store, 1),
        {Owner, {ok, _}} = start_owner(fun() ->
            erllama_cache_store:reserve(Store, disk, <<0:256>>, ?ROOM + 100)
        end),
        ?assertEqual([], stored(Root, 1)),
        {ok, Small} = erllama_cache_writer:save(Store, disk, meta(3), ?PAYLOAD),
        ?assertEqual(
            {error, no_room}, erllama_cache_writer:save(Store, disk, big_meta(2), big_payload())
        ),
        %% And nothing goes in vain.
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Small)),
        kill(Owner),
        eventually(fun() ->
            {error, no_room} =/=
                erllama_cache_writer:save(Store, disk, big_meta(2), big_payload())
        end),
        ?assertEqual([2], stored(Root, 2))
    end).

%% Whatever becomes of a file or a reservation, its room is free afterwards: what fills the whole
%% store still fits, and nothing had to be evicted for it.
room_comes_back(Root) ->
    with_store(#{root => Root, max_bytes => 2 * ?ROOM}, fun(Store) ->
        Whole = binary:copy(<<0>>, 2 * ?ROOM - 260),
        Gone = [
            fun() -> ok = erllama_cache_store:delete(Store, save_big(Store, 1)) end,
            fun() ->
                ok = file:delete(file_of(Root, save_big(Store, 1))),
                miss = erllama_cache_store:load(Store, key(1))
            end,
            fun() ->
                {ok, _} = in_process(fun() -> reserve(Store, key(1)) end),
                none_reserved(Store)
            end,
            fun() ->
                {ok, Token} = reserve(Store, key(1)),
                ok = erllama_cache_store:cancel(Store, key(1), Token)
            end,
            fun() ->
                ok = die_published(Store, key(1)),
                none_reserved(Store)
            end,
            fun() ->
                ok = file:make_dir(file_of(Root, key(1))),
                {error, _} = erllama_cache_writer:save(Store, disk, big_meta(1), big_payload()),
                ok = file:del_dir(file_of(Root, key(1)))
            end
        ],
        _ = [
            begin
                _ = Goes(),
                {ok, Key} = erllama_cache_writer:save(Store, disk, big_meta(2), Whole),
                ok = erllama_cache_store:delete(Store, Key)
            end
         || Goes <- Gone
        ],
        _ = sys:get_state(Store),
        ?assertMatch(#{files := 0, bytes := 0, evictions := 0}, erllama_cache_store:info(Store))
    end).

a_start_makes_room(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        _ = [
            {ok, _} = erllama_cache_writer:save(
                Store, disk, (big_meta(N))#{last_used_time => 1000 - N}, big_payload()
            )
         || N <- [1, 2, 3]
        ]
    end),
    with_store(#{root => Root, max_bytes => 2 * ?ROOM}, fun(Store) ->
        ?assertEqual([1, 2], stored(Root, 3)),
        ?assertMatch(#{files := 2, evictions := 1}, erllama_cache_store:info(Store))
    end).

%% At no time do the files take more than the bound, whoever saves and loads; and no file is left
%% that the index does not know, for it would never be evicted. No key is saved twice, so that the
%% names of one listing were there together, whenever each file is then measured.
many_savers_stay_within_the_bound(Root) ->
    {Savers, Saves, MaxBytes} = {8, 30, 10 * ?ROOM},
    with_store(#{root => Root, max_bytes => MaxBytes}, fun(Store) ->
        in_processes(Savers, fun(Saver) ->
            _ = [
                begin
                    N = Saver * Saves + I,
                    Key = key(N),
                    %% The neighbour's file of the same turn: not there yet, there, or gone again.
                    _ = erllama_cache_store:load(Store, key(Saver rem Savers * Saves + Saves + I)),
                    ?assertEqual(
                        {ok, Key},
                        erllama_cache_writer:save(Store, disk, big_meta(N), big_payload())
                    ),
                    ?assert(bytes_in(Root) =< MaxBytes)
                end
             || I <- lists:seq(1, Saves)
            ]
        end),
        %% What loads have found is in the index when the server has heard of it.
        _ = sys:get_state(Store),
        Unknown = [
            N
         || N <- lists:seq(1, (Savers + 1) * Saves), not is_known(Store, key(N)),
            filelib:is_file(file_of(Root, key(N)))
        ],
        ?assertEqual([], Unknown),
        ?assertMatch(#{reservations := 0}, erllama_cache_store:info(Store)),
        Whole = binary:copy(<<0>>, MaxBytes - 260),
        ?assertMatch({ok, _}, erllama_cache_writer:save(Store, disk, big_meta(1), Whole)),
        ?assertEqual([filename:basename(file_of(Root, key(1)))], files(Root))
    end).

%% Each bounds what it knows of, and forgets what the other has evicted.
two_bounded_stores_share_a_root(Root) ->
    {MaxBytes, Numbers} = {3 * ?ROOM, lists:seq(1, 40)},
    with_store(#{root => Root, max_bytes => MaxBytes}, fun(Store) ->
        with_store(other_store, #{root => Root, max_bytes => MaxBytes}, fun(Other) ->
            Load = fun(Name, N) ->
                case erllama_cache_store:load(Name, key(N)) of
                    {ok, _, Payload} -> Payload =:= big_payload();
                    miss -> true
                end
            end,
            _ = in_processes(2, fun(I) ->
                Mine = lists:nth(I, [Store, Other]),
                [
                    begin
                        Saved = erllama_cache_writer:save(Mine, disk, big_meta(N), big_payload()),
                        ?assert(lists:member(Saved, [{ok, key(N)}, {error, already_present}])),
                        ?assert(Load(Mine, N)),
                        ?assert(Load(Mine, max(1, N - 2)))
                    end
                 || N <- Numbers
                ]
            end),
            ?assert(bytes_in(Root) =< 2 * MaxBytes),
            %% A save makes room for what loads have found, too.
            _ = [
                begin
                    _ = [Load(Name, N) || N <- Numbers],
                    {ok, _} = erllama_cache_writer:save(Name, disk, big_meta(New), big_payload()),
                    ok = its_books_balance(Name, #{max_bytes => MaxBytes}),
                    #{bytes := Bytes} = erllama_cache_store:info(Name),
                    ?assert(Bytes =< MaxBytes)
                end
             || {Name, New} <- [{Store, 41}, {Other, 42}]
            ],
            _ = [
                ok = erllama_cache_store:delete(Name, key(N))
             || Name <- [Store, Other], N <- Numbers ++ [41, 42]
            ],
            ?assertEqual([], files(Root)),
            _ = [sys:get_state(Name) || Name <- [Store, Other]],
            _ = [?assertMatch(#{used := 0, should := 0, watches := 0},
                              gen_server:call(Name, audit)) || Name <- [Store, Other]]
        end)
    end).

%% In a bounded store the server enters what a load has found. It does so when the process that
%% loaded is dead.
a_load_by_a_process_that_ends_is_entered(Root) ->
    with_store(#{root => Root, max_bytes => 2 * ?ROOM}, fun(Store) ->
        with_store(other_store, #{root => Root}, fun(Other) ->
            Key = save_big(Other, 1),
            ok = sys:suspend(Store),
            {ok, _, _} = in_process(fun() -> erllama_cache_store:load(Store, Key) end),
            {ok, _, _} = in_process(fun() -> erllama_cache_store:load(Store, Key) end),
            ?assertNot(is_known(Store, Key)),
            ok = sys:resume(Store),
            Size = filelib:file_size(file_of(Root, Key)),
            ?assertMatch(#{used := Size, should := Size}, gen_server:call(Store, audit)),
            ?assert(is_known(Store, Key))
        end)
    end).

save_big(Store, N) ->
    {ok, Key} = erllama_cache_writer:save(Store, disk, big_meta(N), big_payload()),
    %% Last uses are compared by the millisecond.
    ok = next_millisecond(),
    Key.

big_meta(N) ->
    (meta(N))#{hostname => <<>>, erllama_version => <<>>}.

big_payload() ->
    binary:copy(<<"x">>, ?BIG).

stored(Root, UpTo) ->
    [N || N <- lists:seq(1, UpTo), filelib:is_file(file_of(Root, key(N)))].

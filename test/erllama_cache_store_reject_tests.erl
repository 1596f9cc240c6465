%% States that a model has refused.
-module(erllama_cache_store_reject_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_store_util, [key/1, meta/1, save/2, store_tests/1, with_store/2]).
-import(erllama_cache_test_util, [file_of/2, next_millisecond/0]).

reject_test_() ->
    store_tests([
        fun a_rejected_state_is_put_aside/1,
        fun what_is_not_there_is_rejected_already/1,
        fun the_room_of_a_rejected_file_is_free/1,
        fun only_a_few_are_kept/1,
        fun a_start_forgets_what_is_too_much/1,
        fun a_root_that_cannot_be_written_is_an_error/1
    ]).

a_rejected_state_is_put_aside(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, 1),
        {ok, Bytes} = file:read_file(file_of(Root, Key)),
        ?assertEqual(ok, erllama_cache_store:reject(Store, Key)),
        ?assertEqual(miss, erllama_cache_store:load(Store, Key)),
        ?assertNot(erllama_cache_store:member(Store, Key)),
        ?assertEqual(miss, erllama_cache_store:longest_prefix(Store, meta(1))),
        ?assertEqual({ok, Bytes}, file:read_file(aside(Root, Key))),
        ?assertMatch(#{files := 0, rejected := 1}, erllama_cache_store:info(Store)),
        ?assertEqual(Key, save(Store, 1)),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key))
    end).

what_is_not_there_is_rejected_already(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        ?assertEqual(ok, erllama_cache_store:reject(Store, key(1))),
        Key = save(Store, 2),
        ok = file:delete(file_of(Root, Key)),
        ?assertEqual(ok, erllama_cache_store:reject(Store, Key)),
        ?assertMatch(#{files := 0, rejected := 0}, erllama_cache_store:info(Store))
    end).

the_room_of_a_rejected_file_is_free(Root) ->
    %% Room for two files, and not for three.
    with_store(#{root => Root, max_bytes => 600}, fun(Store) ->
        [_, _] = [save(Store, N) || N <- [1, 2]],
        ok = erllama_cache_store:reject(Store, key(2)),
        _ = save(Store, 3),
        ?assertMatch(#{files := 2, evictions := 0}, erllama_cache_store:info(Store))
    end).

only_a_few_are_kept(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        [reject(Store, N) || N <- lists:seq(1, 20)],
        ?assertEqual(8, length(aside(Root))),
        ?assertMatch(#{rejected := 20}, erllama_cache_store:info(Store))
    end).

a_start_forgets_what_is_too_much(Root) ->
    [ok = file:write_file(aside(Root, key(N)), <<"refused">>) || N <- lists:seq(1, 20)],
    with_store(#{root => Root}, fun(_Store) ->
        ?assertEqual(8, length(aside(Root)))
    end).

a_root_that_cannot_be_written_is_an_error(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, 1),
        %% In the way: a rename onto a directory that is not empty fails for root, too.
        ok = file:make_dir(aside(Root, Key)),
        ok = file:write_file(filename:join(aside(Root, Key), "x"), <<>>),
        ?assertMatch({error, _}, erllama_cache_store:reject(Store, Key)),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key)),
        ok = file:del_dir_r(aside(Root, Key))
    end).

reject(Store, N) ->
    Key = save(Store, N),
    ok = erllama_cache_store:reject(Store, Key),
    next_millisecond().

aside(Root, Key) ->
    unicode:characters_to_list([file_of(Root, Key), ".bad"]).

aside(Root) ->
    filelib:wildcard(filename:join(Root, "*.kvc.bad")).

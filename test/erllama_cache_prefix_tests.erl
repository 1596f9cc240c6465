%% The longest stored prefix: which states are found, by what is in the index, and the keys of
%% prefixes. That the lengths are counted right is also checked at the end of every test of a store
%% (erllama_cache_store_util:its_books_balance/2).
-module(erllama_cache_prefix_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_store_util, [
    corrupt_payload/1, in_process/1, none_reserved/1, patch_file/3, reserve/2, start_owner/1,
    watches/1, with_store/2, with_store/3, with_two_stores/2
]).
-import(erllama_cache_test_util, [ask/2, eventually/1, file_of/2, kill/1, next_millisecond/0]).

%% With room for a few files, and without a bound: what a load finds out of the index goes two ways.
-define(BOUNDS, [infinity, 1 bsl 20]).
-define(FEW_BYTES, 32768).

prefix_test_() ->
    erllama_cache_store_util:store_tests([
        fun an_empty_store_has_no_prefix/1,
        fun the_longest_of_several_is_found/1,
        fun a_state_is_a_prefix_of_itself/1,
        fun a_prompt_that_differs_is_not_found/1,
        fun states_of_another_namespace_are_not_found/1,
        fun text_is_found_by_bytes/1,
        fun an_empty_state_is_a_prefix_of_every_prompt/1,
        fun many_lengths_and_long_prompts_are_found/1,
        fun a_prompt_that_makes_no_key_is_an_error/1,
        fun a_store_that_has_ended_exits_noproc/1
    ]).

index_test_() ->
    erllama_cache_store_util:store_tests([
        fun a_reservation_is_not_found/1,
        fun a_deleted_state_is_not_found/1,
        fun one_of_two_of_a_length_goes/1,
        fun an_evicted_state_is_not_found/1,
        fun a_refused_state_is_not_found_until_replaced/1,
        fun a_refused_state_that_loads_again_is_found/1,
        fun a_scan_finds_the_lengths_of_both_versions/1,
        fun a_file_that_no_load_accepts_is_not_found/1,
        fun a_file_of_another_node_is_found_once_loaded/1,
        fun a_file_of_a_dead_owner_is_found_once_checked/1,
        fun a_key_that_is_taken_over_is_not_found/1,
        fun another_root_has_other_lengths/1,
        fun a_file_that_is_gone_is_missed_once/1
    ]).

%%% What is found

an_empty_store_has_no_prefix(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        ?assertEqual(miss, longest(Store, [1, 2, 3])),
        ?assertEqual(miss, longest(Store, []))
    end).

the_longest_of_several_is_found(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        [Two, Four, _Six] = [save(Store, lists:seq(1, N)) || N <- [2, 4, 6]],
        ?assertEqual(miss, longest(Store, [1])),
        ?assertEqual({ok, Two, 2}, longest(Store, [1, 2, 3])),
        ?assertEqual({ok, Four, 4}, longest(Store, [1, 2, 3, 4, 5])),
        ?assertEqual({ok, Four, 4}, longest(Store, [1, 2, 3, 4, 5, 7, 8, 9]))
    end).

a_state_is_a_prefix_of_itself(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, [1, 2]),
        ?assertEqual({ok, Key, 2}, longest(Store, [1, 2])),
        ?assertEqual({ok, Key, 2}, longest(Store, [1 + (1 bsl 32), 2]))
    end).

a_prompt_that_differs_is_not_found(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        _ = save(Store, [1, 2, 3]),
        One = save(Store, [1]),
        ?assertEqual({ok, One, 1}, longest(Store, [1, 2, 4])),
        ?assertEqual(miss, longest(Store, [2, 2, 3]))
    end).

states_of_another_namespace_are_not_found(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Others = [
            #{fingerprint => <<1:256>>}, #{quant_type => f16}, #{ctx_params_hash => <<1:256>>}
        ],
        Meta = meta([1, 2, 3]),
        Keys = [
            begin
                {ok, Key} = erllama_cache_writer:save(
                    Store, disk, maps:merge(meta([1, 2]), Other), ?PAYLOAD
                ),
                ?assertEqual({ok, Key, 2},
                             erllama_cache_store:longest_prefix(Store, maps:merge(Meta, Other))),
                Key
            end
         || Other <- Others
        ],
        ?assertEqual(3, length(lists:usort(Keys))),
        ?assertEqual(miss, erllama_cache_store:longest_prefix(Store, Meta))
    end).

%% Also between the bytes of a character.
text_is_found_by_bytes(Root) ->
    with_store(#{root => Root, keyed_by => text}, fun(Store) ->
        [Short, Long] = [save(Store, Text) || Text <- [<<"Grüß"/utf8>>, <<"Grüße "/utf8>>]],
        Half = save(Store, binary:part(<<"Grü"/utf8>>, 0, 3)),
        ?assertEqual({ok, Half, 3}, longest(Store, <<"Grün"/utf8>>)),
        ?assertEqual({ok, Short, 6}, longest(Store, <<"Grüß Gott"/utf8>>)),
        ?assertEqual({ok, Long, 8}, longest(Store, <<"Grüße aus"/utf8>>)),
        %% The tokens do not matter.
        Meta = maps:remove(tokens, meta(<<"Grüße "/utf8>>)),
        ?assertEqual({ok, Long, 8}, erllama_cache_store:longest_prefix(Store, Meta))
    end).

an_empty_state_is_a_prefix_of_every_prompt(Root) ->
    [
        with_store(#{root => Root, keyed_by => KeyedBy}, fun(Store) ->
            Empty = save(Store, Nothing),
            ?assertEqual({ok, Empty, 0}, longest(Store, Some)),
            ?assertEqual({ok, Empty, 0}, longest(Store, Nothing)),
            Longer = save(Store, Some),
            ?assertMatch({ok, Longer, _}, longest(Store, Some)),
            %% The key of nothing is one for both.
            [ok = erllama_cache_store:delete(Store, Key) || Key <- [Empty, Longer]]
        end)
     || {KeyedBy, Nothing, Some} <- [{tokens, [], [1, 2]}, {text, <<>>, <<"ab">>}]
    ].

%% On both sides of what one call hashes on a normal scheduler, and of what it encodes there.
many_lengths_and_long_prompts_are_found(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Lengths = lists:seq(1, 150) ++ [?FEW_BYTES div 4, 40000],
        Keys = [{N, save(Store, lists:seq(1, N))} || N <- Lengths],
        [
            ?assertEqual({ok, Key, N}, longest(Store, lists:seq(1, N) ++ [0, 0]))
         || {N, Key} <- Keys
        ],
        Key = proplists:get_value(40000, Keys),
        ?assertEqual({ok, Key, 40000}, longest(Store, lists:seq(1, 100000)))
    end).

a_prompt_that_makes_no_key_is_an_error(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        _ = save(Store, [1]),
        Meta = meta([1]),
        Find = fun(Wrong) -> erllama_cache_store:longest_prefix(Store, maps:merge(Meta, Wrong)) end,
        [
            ?assertEqual({error, {invalid_meta, Field}}, Find(#{Field => Value}))
         || {Field, Value} <- [
                {tokens, none}, {tokens, [1, none]}, {tokens, [1 | 2]}, {fingerprint, <<1>>},
                {ctx_params_hash, 1}, {quant_type, mxfp4}
            ]
        ],
        [
            ?assertEqual({error, {missing_key, Field}},
                         erllama_cache_store:longest_prefix(Store, maps:remove(Field, Meta)))
         || Field <- [tokens, fingerprint, quant_type, ctx_params_hash]
        ],
        ?assertMatch({ok, _, 1}, Find(#{prompt_text => none, save_reason => none}))
    end).

a_store_that_has_ended_exits_noproc(Root) ->
    with_store(#{root => Root}, fun(_Store) -> ok end),
    ?assertExit({noproc, _}, longest(?STORE, [1])).

%%% How rows come and go

%% Although there is a file of its length.
a_reservation_is_not_found(Root) ->
    each_bound(Root, fun(Store) ->
        Key = key([1, 2]),
        Other = save(Store, [3, 4]),
        {Owner, {ok, Token}} = start_owner(fun() -> reserve(Store, Key) end),
        ?assertEqual(miss, longest(Store, [1, 2])),
        ok = ask(Owner, fun() -> erllama_cache_store:cancel(Store, Key, Token) end),
        ?assertEqual(miss, longest(Store, [1, 2])),
        kill(Owner),
        Key = save(Store, [1, 2]),
        ?assertEqual({ok, Key, 2}, longest(Store, [1, 2])),
        [ok = erllama_cache_store:delete(Store, Each) || Each <- [Key, Other]]
    end).

a_deleted_state_is_not_found(Root) ->
    each_bound(Root, fun(Store) ->
        Key = save(Store, [1, 2]),
        ok = erllama_cache_store:delete(Store, Key),
        ?assertEqual(miss, longest(Store, [1, 2])),
        ?assertEqual(#{}, lengths(Store))
    end).

one_of_two_of_a_length_goes(Root) ->
    each_bound(Root, fun(Store) ->
        [One, Other] = [save(Store, Tokens) || Tokens <- [[1, 2], [3, 4]]],
        ?assertEqual(#{{tokens, 2} => 2}, lengths(Store)),
        ok = erllama_cache_store:delete(Store, One),
        ?assertEqual(miss, longest(Store, [1, 2])),
        ?assertEqual({ok, Other, 2}, longest(Store, [3, 4])),
        ok = erllama_cache_store:delete(Store, Other)
    end).

an_evicted_state_is_not_found(Root) ->
    Payload = binary:copy(<<0>>, 10000),
    with_store(#{root => Root, max_bytes => 25000}, fun(Store) ->
        _Old = save(Store, [1], Payload),
        ok = next_millisecond(),
        New = save(Store, [1, 2], Payload),
        ?assertMatch({ok, New, 2}, longest(Store, [1, 2])),
        Newest = save(Store, [1, 2, 3], Payload),
        ?assertEqual(miss, longest(Store, [1])),
        ?assertEqual({ok, New, 2}, longest(Store, [1, 2])),
        ?assertEqual({ok, Newest, 3}, longest(Store, [1, 2, 3])),
        ?assertEqual(#{{tokens, 2} => 1, {tokens, 3} => 1}, lengths(Store))
    end).

a_refused_state_is_not_found_until_replaced(Root) ->
    each_bound(Root, fun(Store) ->
        [Short, Long, Other] = [save(Store, Tokens) || Tokens <- [[1], [1, 2], [3, 4]]],
        corrupt_payload(file_of(Root, Long)),
        ?assertEqual({ok, Long, 2}, longest(Store, [1, 2])),
        ?assertMatch({error, {corrupt, _}}, erllama_cache_store:load(Store, Long)),
        ?assertEqual({ok, Short, 1}, longest(Store, [1, 2])),
        Long = save(Store, [1, 2]),
        ?assertEqual({ok, Long, 2}, longest(Store, [1, 2])),
        %% And one that was refused may be deleted.
        corrupt_payload(file_of(Root, Long)),
        ?assertMatch({error, {corrupt, _}}, erllama_cache_store:load(Store, Long)),
        [ok = erllama_cache_store:delete(Store, Key) || Key <- [Short, Long, Other]]
    end).

%% As another node has saved it anew, or as a scan could not read it.
a_refused_state_that_loads_again_is_found(Root) ->
    each_bound(Root, fun(Store) ->
        Key = save(Store, [1, 2]),
        {ok, Good} = file:read_file(file_of(Root, Key)),
        corrupt_payload(file_of(Root, Key)),
        ?assertMatch({error, {corrupt, _}}, erllama_cache_store:load(Store, Key)),
        ok = file:write_file(file_of(Root, Key), Good),
        ?assertEqual(miss, longest(Store, [1, 2])),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key)),
        ?assertEqual({ok, Key, 2}, longest(Store, [1, 2])),
        ok = erllama_cache_store:delete(Store, Key)
    end),
    Unread = with_store(#{root => Root}, fun(Store) -> save(Store, [1, 2]) end),
    {ok, Good} = file:read_file(file_of(Root, Unread)),
    patch_file(file_of(Root, Unread), 3, <<9>>),
    with_store(#{root => Root}, fun(Store) ->
        ok = file:write_file(file_of(Root, Unread), Good),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Unread)),
        ?assertEqual({ok, Unread, 2}, longest(Store, [1, 2, 3]))
    end).

%% Those of the version that the store writes are found, the others are only loaded.
a_scan_finds_the_lengths_of_both_versions(Root) ->
    Tokens = with_store(#{root => Root}, fun(Store) -> save(Store, [1, 2, 3]) end),
    Text = with_store(#{root => Root, keyed_by => text}, fun(Store) ->
        ?assertEqual(miss, longest(Store, <<"abcd">>)),
        save(Store, <<"abc">>)
    end),
    with_store(#{root => Root, keyed_by => text}, fun(Store) ->
        ?assertEqual({ok, Text, 3}, longest(Store, <<"abcd">>)),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Tokens)),
        ?assertEqual(#{{tokens, 3} => 1, {text, 3} => 1}, lengths(Store))
    end),
    with_store(#{root => Root}, fun(Store) ->
        ?assertEqual({ok, Tokens, 3}, longest(Store, [1, 2, 3, 4])),
        %% The key of this text is that of these tokens.
        Bytes = <<1:32/little, 2:32/little, 3:32/little>>,
        ?assertEqual({ok, Tokens},
                     erllama_cache_store:key(meta(Bytes), #{keyed_by => text}))
    end),
    with_store(#{root => Root, keyed_by => text}, fun(Store) ->
        ok = erllama_cache_store:delete(Store, Text),
        Twelve = save(Store, <<"twelve bytes">>),
        ?assertEqual(miss, longest(Store, <<1:32/little, 2:32/little, 3:32/little, "abc">>)),
        ?assertEqual({ok, Twelve, 12}, longest(Store, <<"twelve bytes more">>))
    end).

a_file_that_no_load_accepts_is_not_found(Root) ->
    Key = with_store(#{root => Root}, fun(Store) -> save(Store, [1, 2]) end),
    patch_file(file_of(Root, Key), 3, <<9>>),
    with_store(#{root => Root}, fun(Store) ->
        ?assertMatch(#{files := 1}, erllama_cache_store:info(Store)),
        ?assertEqual(miss, longest(Store, [1, 2]))
    end).

a_file_of_another_node_is_found_once_loaded(Root) ->
    [
        with_two_stores(Dir, fun(Other, _) ->
            with_store(third_store, #{root => Dir, max_bytes => MaxBytes, keyed_by => KeyedBy},
                       fun(Store) ->
                Key = save(Other, [1, 2]),
                ?assertEqual(miss, longest(Store, [1, 2], <<"text">>)),
                ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key)),
                _ = sys:get_state(Store),
                ?assertEqual(#{{tokens, 2} => 1}, lengths(Store)),
                Expected = case KeyedBy of tokens -> {ok, Key, 2}; text -> miss end,
                ?assertEqual(Expected, longest(Store, [1, 2], <<1:32/little, 2:32/little>>)),
                ok = erllama_cache_store:delete(Other, Key),
                ?assertEqual(miss, erllama_cache_store:load(Store, Key)),
                ?assertEqual(miss, longest(Store, [1, 2], <<"text">>))
            end)
        end)
     || MaxBytes <- ?BOUNDS, KeyedBy <- [tokens, text],
        Dir <- [filename:join(Root, lists:concat([MaxBytes, KeyedBy]))], ok <- [file:make_dir(Dir)]
    ].

a_file_of_a_dead_owner_is_found_once_checked(Root) ->
    with_two_stores(Root, fun(Store, Other) ->
        Key = save(Other, [1, 2]),
        {Owner, {ok, _}} = start_owner(fun() -> reserve(Store, Key) end),
        ?assertEqual(miss, longest(Store, [1, 2])),
        kill(Owner),
        none_reserved(Store),
        ?assertEqual({ok, Key, 2}, longest(Store, [1, 2])),
        %% Without a file, nothing is.
        {ok, _} = in_process(fun() -> reserve(Store, key([1, 2, 3])) end),
        none_reserved(Store),
        ?assertEqual({ok, Key, 2}, longest(Store, [1, 2, 3]))
    end).

a_key_that_is_taken_over_is_not_found(Root) ->
    each_bound(Root, fun(Store) ->
        Key = save(Store, [1, 2]),
        %% Another node has deleted it: it may be saved again.
        ok = file:delete(file_of(Root, Key)),
        {Loser, {ok, Lost}} = start_owner(fun() -> reserve(Store, Key) end),
        ?assertEqual(miss, longest(Store, [1, 2])),
        eventually(fun() -> watches(Store) =:= 1 end),
        erllama_cache_index:end_lease(Store, Key),
        {Winner, {ok, Token}} = start_owner(fun() -> reserve(Store, Key) end),
        Announce = fun(Own) ->
            fun() ->
                Content = {tokens, <<1:32/little, 2:32/little>>, 0},
                erllama_cache_store:announce(Store, Key, Own, 1000, <<>>, Content)
            end
        end,
        ?assertEqual({error, expired}, ask(Loser, Announce(Lost))),
        ?assertEqual(miss, longest(Store, [1, 2])),
        ?assertEqual(ok, ask(Winner, Announce(Token))),
        ?assertEqual({ok, Key, 2}, longest(Store, [1, 2])),
        [kill(Owner) || Owner <- [Loser, Winner]],
        ?assertEqual(miss, erllama_cache_store:load(Store, Key))
    end).

another_root_has_other_lengths(Base) ->
    [
        begin
            [Root, Aside] = [filename:join(Base, lists:concat([Name, MaxBytes]))
                             || Name <- [root, aside]],
            ok = file:make_dir(Root),
            with_store(#{root => Root, max_bytes => MaxBytes}, fun(Store) ->
                One = save(Store, [1]),
                _ = save(Store, [1, 2]),
                ok = file:rename(Root, Aside),
                ok = file:make_dir(Root),
                {ok, _} = file:copy(file_of(Aside, One), file_of(Root, One)),
                Three = save(Store, [1, 2, 3]),
                _ = sys:get_state(Store),
                ?assertEqual({ok, Three, 3}, longest(Store, [1, 2, 3])),
                ?assertEqual({ok, One, 1}, longest(Store, [1, 2])),
                ?assertEqual(#{{tokens, 1} => 1, {tokens, 3} => 1}, lengths(Store))
            end)
        end
     || MaxBytes <- ?BOUNDS
    ].

%% Also by a server that does not hear of it now.
a_file_that_is_gone_is_missed_once(Root) ->
    each_bound(Root, fun(Store) ->
        [Short, Long, _] = Keys = [save(Store, Tokens) || Tokens <- [[1], [1, 2], [1, 2, 3]]],
        [ok = file:delete(file_of(Root, Key)) || Key <- tl(Keys)],
        ok = sys:suspend(Store),
        ?assertMatch({ok, _, 3}, longest(Store, [1, 2, 3])),
        ?assertEqual({ok, Short, 1}, longest_that_loads(Store, [1, 2, 3])),
        ?assertEqual({ok, Short, 1}, longest(Store, [1, 2, 3])),
        ok = sys:resume(Store),
        _ = sys:get_state(Store),
        ?assertMatch(#{files := 1}, erllama_cache_store:info(Store)),
        Long = save(Store, [1, 2]),
        ?assertEqual({ok, Long, 2}, longest_that_loads(Store, [1, 2, 3])),
        [ok = erllama_cache_store:delete(Store, Key) || Key <- [Short, Long]]
    end).

longest_that_loads(Store, Tokens) ->
    longest_that_loads(Store, Tokens, []).

longest_that_loads(Store, Tokens, Missed) ->
    {ok, Key, Length} = longest(Store, Tokens),
    ?assertNot(lists:member(Key, Missed)),
    case erllama_cache_store:load(Store, Key) of
        {ok, _, ?PAYLOAD} -> {ok, Key, Length};
        miss -> longest_that_loads(Store, Tokens, [Key | Missed])
    end.

%%% The keys of prefixes

a_prefixs_key_is_that_of_its_bytes_test() ->
    Bytes = rand:bytes(1000),
    [
        begin
            %% Nothing, the whole, and one end twice are among them.
            Some = [rand:uniform(1001) - 1 || _ <- lists:seq(1, Count)],
            Ends = lists:sort([0, 500, 500, 1000 | Some]),
            Expected = [erllama_cache_nif:key(<<1:256>>, 2, <<3:256>>, binary:part(Bytes, 0, End))
                        || End <- Ends],
            [?assertEqual(Expected, [Key || <<Key:32/binary>> <= PrefixKeys(Bytes, Ends)])
             || PrefixKeys <- prefix_keys()]
        end
     || Count <- [0, 1, 64, 500]
    ],
    [?assertEqual(<<>>, PrefixKeys(Bytes, [])) || PrefixKeys <- prefix_keys()].

what_is_not_within_the_bytes_is_a_badarg_test() ->
    Bytes = binary:copy(<<1>>, 100),
    [
        ?assertError(badarg, PrefixKeys(Bytes, Ends))
     || PrefixKeys <- prefix_keys(),
        Ends <- [
            [101], [1, 101], [2, 1], [-1], [1.0], [none], [1 | 2], none, 7, <<1>>,
            [1 bsl 62], [1 bsl 64], [1 bsl 100], [-(1 bsl 63)], [50, 100, 0]
        ]
    ],
    [
        ?assertError(badarg, erllama_cache_nif:prefix_keys(F, Q, C, K, [0]))
     || {F, Q, C, K} <- [
            {<<1>>, 1, <<1:256>>, <<>>}, {<<1:256>>, none, <<1:256>>, <<>>},
            {<<1:256>>, 1, <<1:264>>, <<>>}, {<<1:256>>, 1, <<1:256>>, none}
        ]
    ].

prefix_keys() ->
    [
        fun(Bytes, Ends) ->
            erllama_cache_nif:Function(<<1:256>>, 2, <<3:256>>, Bytes, Ends)
        end
     || Function <- [prefix_keys, prefix_keys_of_many]
    ].

%%% In short

each_bound(Root, Fun) ->
    [with_store(#{root => Root, max_bytes => MaxBytes}, Fun) || MaxBytes <- ?BOUNDS].

%% A prompt is a list of tokens, or a text.
meta(Tokens) when is_list(Tokens) -> erllama_cache_test_util:meta(Tokens);
meta(Text) -> (erllama_cache_test_util:meta())#{prompt_text => Text}.

longest(Store, Prompt) ->
    erllama_cache_store:longest_prefix(Store, meta(Prompt)).

longest(Store, Tokens, Text) ->
    Meta = (erllama_cache_test_util:meta(Tokens))#{prompt_text => Text},
    erllama_cache_store:longest_prefix(Store, Meta).

key(Tokens) ->
    {ok, Key} = erllama_cache_store:key(meta(Tokens)),
    Key.

save(Store, Prompt) ->
    save(Store, Prompt, ?PAYLOAD).

save(Store, Prompt, Payload) ->
    {ok, Key} = erllama_cache_writer:save(Store, disk, meta(Prompt), Payload),
    Key.

lengths(Store) ->
    #{lengths := Lengths} = gen_server:call(Store, audit),
    Lengths.

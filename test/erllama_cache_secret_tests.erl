%% Where a secret comes from, what is refused as one, and that none is shown.
-module(erllama_cache_secret_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [each/3, temporary_dir/1, meta/1]).
-import(erllama_cache_store_util, [running/3, start_store/2, start_writer/1]).

-define(WRITER, erllama_cache_writer).
-define(KEY, <<"0123456789abcdef0123456789ABCDEF">>).

secret_test_() ->
    each(fun() -> temporary_dir(?MODULE) end, fun file:del_dir_r/1, [
        fun a_secret_comes_from_a_file/1,
        fun a_bad_secret_starts_nothing/1,
        fun a_secret_is_never_shown/1
    ]).

a_secret_comes_from_a_file(Root) ->
    Hex = binary:encode_hex(?KEY),
    Key = running(Root, #{mac_key => secret(?KEY)}, fun() -> save(1) end),
    [
        begin
            File = filename:join(Root, "secret"),
            ok = file:write_file(File, Contents),
            running(Root, #{mac_key => {file, File}}, fun() ->
                ?assertMatch({ok, _, <<"payload">>}, load(Key))
            end)
        end
     || Contents <- [?KEY, Hex, string:lowercase(Hex), [Hex, "\n"], [Hex, "\r\n"]]
    ].

a_bad_secret_starts_nothing(Root) ->
    File = filename:join(Root, "secret"),
    [
        begin
            ok = file:write_file(File, Contents),
            ?assertEqual(
                {error, {mac_key, bad_key}}, start_store(Root, #{mac_key => {file, File}})
            ),
            ?assertEqual({error, {mac_key, bad_key}}, start_writer(#{mac_key => {file, File}}))
        end
     || Contents <- ["", "short", lists:duplicate(64, $g), [?KEY, "\n"]]
    ],
    [
        begin
            ?assertEqual({error, {mac_key, Reason}}, start_store(Root, #{mac_key => Source})),
            ?assertEqual({error, {mac_key, Reason}}, start_writer(#{mac_key => Source}))
        end
     || {Reason, Source} <- [
            {enoent, {file, filename:join(Root, "none")}},
            {bad_key, secret(<<"short">>)},
            {bad_key, secret(not_a_binary)},
            {raised, fun() -> error(?KEY) end}
        ]
    ],
    %% The key itself is no source; what is told of it does not have it.
    ?assertError({invalid_option, mac_key, hidden}, start_store(Root, #{mac_key => ?KEY})),
    ?assertError({invalid_config, mac_key, hidden}, start_writer(#{mac_key => ?KEY})).

a_secret_is_never_shown(Root) ->
    running(Root, #{mac_key => secret(?KEY)}, fun() ->
        Key = save(1),
        {ok, _, _} = load(Key),
        Shown = [
            persistent_term:get(), ?WRITER:info(), erllama_cache_store:info(?STORE),
            ets:tab2list(?STORE), sys:get_state(?STORE), sys:get_state(?WRITER),
            process_info(self(), dictionary), Key
        ],
        Printed = unicode:characters_to_binary(io_lib:format("~w ~p", [Shown, Shown])),
        Bytes = iolist_to_binary(lists:join($,, [integer_to_list(B) || <<B>> <= ?KEY])),
        [
            ?assertEqual(nomatch, binary:match(Printed, Secret))
         || Secret <- [?KEY, Bytes, binary:encode_hex(?KEY)]
        ]
    end).

secret(Key) -> fun() -> Key end.

save(N) ->
    {ok, Key} = ?WRITER:save(?STORE, disk, meta([N]), <<"payload">>),
    Key.

load(Key) ->
    erllama_cache_store:load(?STORE, Key).

%% Both versions of the format: a store writes the one that its keys ask for, and reads both.
-module(erllama_cache_versions_tests).

-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [
    file_of/2, in_project/1, each/3, temporary_dir/1, run_command/2
]).

-define(STORE, versions_store).

versions_test_() ->
    each(fun setup/0, fun teardown/1, [
        fun files_of_both_are_loaded/1,
        fun a_key_is_that_of_the_files_version/1,
        fun only_version_2_has_agent_prefix/1,
        fun a_store_keyed_by_text_writes_version_2/1,
        fun a_root_changes_from_tokens_to_text_and_back/1,
        fun one_prompt_has_a_key_for_each_version/1,
        fun only_keys_of_text_are_saved_as_agent_prefix/1,
        fun a_key_of_text_is_like_any_other/1
    ]).

files_of_both_are_loaded({_Root, Vectors}) ->
    Files = length(Vectors),
    ?assertMatch(#{files := Files}, erllama_cache_store:info(?STORE)),
    [
        begin
            {ok, Expected} = file:read_file(Path ++ ".payload"),
            {ok, Info, Payload} = erllama_cache_store:load(?STORE, Key),
            ?assertEqual({Path, Version}, {Path, maps:get(version, Info)}),
            ?assertEqual(Expected, Payload)
        end
     || {Version, Path, Key} <- Vectors
    ].

%% What both versions have is what a file has in the other one, but for its name.
a_key_is_that_of_the_files_version({Root, Vectors}) ->
    [
        begin
            patch(Root, Key, 3, <<(3 - Version)>>),
            ?assertEqual({error, {corrupt, key_mismatch}}, erllama_cache_store:load(?STORE, Key))
        end
     || {Version, Path, Key} <- Vectors,
        %% No tokens and no text are one key, and agent_prefix has its own test.
        not lists:member(filename:basename(Path), ["00", "06"])
    ].

only_version_2_has_agent_prefix({Root, Vectors}) ->
    [Key] = [Key || {2, Path, Key} <- Vectors, filename:basename(Path) =:= "06"],
    ?assertMatch({ok, #{save_reason := agent_prefix}, _}, erllama_cache_store:load(?STORE, Key)),
    patch(Root, Key, 3, <<1>>),
    ?assertEqual({error, {corrupt, bad_save_reason}}, erllama_cache_store:load(?STORE, Key)).

a_store_keyed_by_text_writes_version_2({Root, _Vectors}) ->
    restart(Root, text),
    {ok, Key} = erllama_cache_writer:save(?STORE, disk, meta(<<"Once upon">>), <<"payload">>),
    ?assertMatch({ok, <<_:24, 2, _/binary>>}, file:read_file(file_of(Root, Key))),
    {ok, Info, <<"payload">>} = erllama_cache_store:load(?STORE, Key),
    ?assertMatch(#{version := 2, prompt_text := <<"Once upon">>}, Info),
    ?assertEqual({error, already_present},
                 erllama_cache_writer:save(?STORE, disk, meta(<<"Once upon">>), <<"payload">>)),
    {0, _} = oracle(["check", file_of(Root, Key)]).

a_root_changes_from_tokens_to_text_and_back({Root, _Vectors}) ->
    Save = fun() ->
        {ok, Key} = erllama_cache_writer:save(?STORE, disk, meta(<<"both">>), <<"payload">>),
        Key
    end,
    Tokens = Save(),
    restart(Root, text),
    Text = Save(),
    ?assertNotEqual(Tokens, Text),
    Loaded = fun() ->
        [
            element(2, {ok, _, _} = erllama_cache_store:load(?STORE, Key))
         || Key <- [Tokens, Text]
        ]
    end,
    ?assertMatch([#{version := 1}, #{version := 2}], Loaded()),
    restart(Root, tokens),
    ?assertMatch([#{version := 1}, #{version := 2}], Loaded()).

%% What is not part of a key does not change it.
one_prompt_has_a_key_for_each_version({Root, _Vectors}) ->
    Key = fun(Meta, KeyedBy) ->
        {ok, Found} = erllama_cache_store:key(Meta, #{keyed_by => KeyedBy}),
        Found
    end,
    Meta = meta(<<"Once upon">>),
    ?assertEqual(Key(Meta, tokens), Key(maps:remove(prompt_text, Meta), tokens)),
    ?assertEqual(Key(Meta, text), Key(maps:remove(tokens, Meta), text)),
    ?assertNotEqual(Key(Meta, text), Key(meta(<<"Once upon a">>), text)),
    ?assertEqual({ok, Key(Meta, tokens)}, erllama_cache_store:key(Meta)),
    #{fingerprint := Fingerprint, ctx_params_hash := CtxParamsHash} = Meta,
    Plain = crypto:hash(sha256, [Fingerprint, 1, CtxParamsHash, <<"Once upon">>]),
    ?assertEqual(Plain, Key(Meta#{quant_type := f16}, text)),
    restart(Root, text),
    ?assertEqual({ok, Key(Meta, text)},
                 erllama_cache_writer:save(?STORE, disk, Meta, <<"payload">>)).

only_keys_of_text_are_saved_as_agent_prefix({Root, _Vectors}) ->
    Meta = (meta(<<"system prompt">>))#{save_reason := agent_prefix},
    Save = fun() -> erllama_cache_writer:save(?STORE, disk, Meta, <<"payload">>) end,
    ?assertEqual({error, {invalid_meta, save_reason}}, Save()),
    restart(Root, text),
    {ok, Key} = Save(),
    ?assertMatch({ok, #{save_reason := agent_prefix}, _}, erllama_cache_store:load(?STORE, Key)).

%% Empty, and longer than what a call on a normal scheduler hashes.
a_key_of_text_is_like_any_other({Root, _Vectors}) ->
    restart(Root, text),
    [
        begin
            Meta = meta(Text),
            {ok, Key} = erllama_cache_writer:save(?STORE, disk, Meta, <<"payload">>),
            ?assertEqual({ok, Key}, erllama_cache_store:key(Meta, #{keyed_by => text})),
            ?assertMatch({ok, #{prompt_text := Text}, _}, erllama_cache_store:load(?STORE, Key))
        end
     || Text <- [<<>>, <<0>>, binary:copy(<<"long ">>, 40000)]
    ].

meta(Text) ->
    (erllama_cache_test_util:meta())#{prompt_text => Text}.

restart(Root, KeyedBy) ->
    ok = gen_server:stop(?STORE),
    {ok, _} = erllama_cache_store:start_link(?STORE, #{root => Root, keyed_by => KeyedBy}),
    ok.

oracle(Args) ->
    run_command("python3", [in_project("proofs/oracle/kvc_oracle.py") | Args]).

%% A store over the files that another implementation wrote, and of each its version, its path
%% without an extension, and its key.
setup() ->
    Root = temporary_dir(?MODULE),
    Vectors = vectors(1, in_project("test/vectors")) ++ vectors(2, in_project("test/vectors2")),
    [{ok, _} = file:copy(Path ++ ".kvc", file_of(Root, Key)) || {_, Path, Key} <- Vectors],
    {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store}),
    {ok, _} = erllama_cache_store:start_link(?STORE, #{root => Root}),
    {Root, Vectors}.

vectors(Version, Dir) ->
    {ok, Keys} = file:read_file(filename:join(Dir, "KEYS")),
    [
        begin
            [N, "key", Key, "crc32c", _Crc] = string:lexemes(Line, " "),
            {Version, filename:join(Dir, N), <<(list_to_integer(Key, 16)):256>>}
        end
     || Line <- string:lexemes(binary_to_list(Keys), "\n")
    ].

teardown({Root, _Vectors}) ->
    ok = gen_server:stop(?STORE),
    ok = gen_server:stop(erllama_cache_writer),
    ok = file:del_dir_r(Root).

patch(Root, Key, At, Bytes) ->
    {ok, File} = file:open(file_of(Root, Key), [read, write, binary]),
    ok = file:pwrite(File, At, Bytes),
    ok = file:close(File).

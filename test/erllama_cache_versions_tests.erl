%% A store reads files of both versions of the format, whatever it writes.
-module(erllama_cache_versions_tests).

-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [file_of/2, in_project/1, each/3, temporary_dir/1]).

-define(STORE, versions_store).

versions_test_() ->
    each(fun setup/0, fun teardown/1, [
        fun files_of_both_are_loaded/1,
        fun a_key_is_that_of_the_files_version/1,
        fun only_version_2_has_agent_prefix/1
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

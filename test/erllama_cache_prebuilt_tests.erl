%% The build hook with a library that somebody else has built: from a directory and from a server,
%% and everything that can be wrong with it.
-module(erllama_cache_prebuilt_tests).

-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [temporary_dir/1, in_project/1, run_command/2]).

-define(LIBRARY, <<"a library, as far as the hook knows">>).

prebuilt_test_() ->
    {foreach, fun setup/0, fun(#{base := Base}) -> ok = file:del_dir_r(Base) end, [
        fun(Project) -> {Name, {timeout, 60, fun() -> Test(Project) end}} end
     || {Name, Test} <- [
            {"from a directory", fun from_a_directory/1},
            {"from a server", fun from_a_server/1},
            {"a tampered archive", fun a_tampered_archive_is_refused/1},
            {"an archive that is not there", fun a_missing_archive_is_an_error/1},
            {"an archive without a sum", fun an_archive_without_a_sum_is_an_error/1},
            {"an archive without the library", fun an_archive_without_the_library_is_an_error/1}
        ]
    ]}.

%% What the hook needs of the project, and a directory with an archive whose sum it has.
setup() ->
    Base = temporary_dir(?MODULE),
    [
        begin
            To = filename:join([Base, "project", File]),
            ok = filelib:ensure_dir(To),
            {ok, _} = file:copy(in_project(File), To)
        end
     || File <- ["c_src/Makefile", "c_src/prebuilt.sh", "src/erllama_cache_nif.app.src"]
    ],
    Project = #{base => Base, c_src => filename:join([Base, "project", "c_src"]),
                archives => filename:join(Base, "archives"), archive => archive_name()},
    ok = file:make_dir(maps:get(archives, Project)),
    ok = archive(Project, [{"erllama_cache_nif.so", ?LIBRARY}, {"kvc", <<"a program">>}]),
    Project.

archive_name() ->
    {ok, [{application, _, Keys}]} = file:consult(in_project("src/erllama_cache_nif.app.src")),
    [Machine, System] = [string:trim(os:cmd("uname " ++ Flag)) || Flag <- ["-m", "-s"]],
    Libc = case string:find(os:cmd("ldd --version 2>&1"), "musl") of
        nomatch -> "gnu";
        _ -> "musl"
    end,
    "Linux" = System,
    lists:concat(["erllama_cache_nif-", proplists:get_value(vsn, Keys), "-", Machine,
                  "-unknown-linux-", Libc, ".tar.gz"]).

%% Packed as `make prebuilt' does it.
archive(#{base := Base, archives := Archives, archive := Name, c_src := CSrc}, Files) ->
    Path = filename:join(Archives, Name),
    Packed = filename:join(Base, "packed"),
    _ = file:del_dir_r(Packed),
    ok = file:make_dir(Packed),
    [ok = file:write_file(filename:join(Packed, File), Bytes) || {File, Bytes} <- Files],
    {0, _} = run_command(in_project("tools/archive.sh"), [Packed, Path]),
    {ok, Bytes} = file:read_file(Path),
    Sum = string:lowercase(binary:encode_hex(crypto:hash(sha256, Bytes))),
    file:write_file(filename:join(CSrc, "checksums.txt"), [Sum, "  ", Name, "\n"]).

%% Without cargo: if it were called, that would be an error.
install(#{c_src := CSrc}, From) ->
    Command = lists:concat(["PATH=/usr/bin:/bin HOME=/nonexistent CARGO_HOME=/nonexistent ",
                            "ERLLAMA_CACHE_NIF_PREBUILT='", From, "' make -C '", CSrc, "' 2>&1; ",
                            "echo status $?"]),
    Output = os:cmd(Command),
    case string:find(Output, "status 0") of
        nomatch -> {error, Output};
        _ -> {ok, Output}
    end.

installed(#{base := Base}) ->
    file:read_file(filename:join([Base, "project", "priv", "erllama_cache_nif.so"])).

from_a_directory(#{archives := Archives} = Project) ->
    ?assertMatch({ok, _}, install(Project, Archives)),
    ?assertEqual({ok, ?LIBRARY}, installed(Project)),
    %% Once: the archive is not needed again.
    ok = file:del_dir_r(Archives),
    ?assertMatch({ok, _}, install(Project, Archives)).

from_a_server(#{archives := Archives} = Project) ->
    {ok, _} = application:ensure_all_started(inets),
    {ok, Server} = inets:start(httpd, [
        {port, 0}, {bind_address, {127, 0, 0, 1}}, {server_name, "localhost"},
        {server_root, Archives}, {document_root, Archives}
    ]),
    try
        [{port, Port}] = httpd:info(Server, [port]),
        Address = lists:concat(["http://127.0.0.1:", Port]),
        ?assertMatch({ok, _}, install(Project, Address)),
        ?assertEqual({ok, ?LIBRARY}, installed(Project)),
        ok = archive(Project, [{"erllama_cache_nif.so", <<"the next one">>}]),
        ?assertMatch({ok, _}, install(Project, Address ++ "/")),
        ?assertEqual({ok, <<"the next one">>}, installed(Project)),
        ok = forget_what_is_installed(Project),
        wrong(Project, Address ++ "/nothing/here", "cannot get")
    after
        ok = inets:stop(httpd, Server)
    end.

a_tampered_archive_is_refused(#{archives := Archives, archive := Name} = Project) ->
    {ok, _} = install(Project, Archives),
    Path = filename:join(Archives, Name),
    {ok, Bytes} = file:read_file(Path),
    %% Another library, and its sum is not in the list.
    {ok, List} = file:read_file(filename:join(maps:get(c_src, Project), "checksums.txt")),
    ok = archive(Project, [{"erllama_cache_nif.so", <<"malice">>}]),
    ok = file:write_file(filename:join(maps:get(c_src, Project), "checksums.txt"), List),
    {ok, Other} = file:read_file(Path),
    ?assertNotEqual(Bytes, Other),
    ok = forget_what_is_installed(Project),
    wrong(Project, Archives, "is not the one of this release"),
    ?assertEqual({ok, ?LIBRARY}, installed(Project)).

%% So that the archive is looked at again.
forget_what_is_installed(#{base := Base}) ->
    file:delete(filename:join([Base, "project", "priv", ".prebuilt"])).

a_missing_archive_is_an_error(#{archives := Archives, archive := Name} = Project) ->
    ok = file:delete(filename:join(Archives, Name)),
    wrong(Project, Archives, "there is no"),
    ?assertEqual({error, enoent}, installed(Project)).

an_archive_without_a_sum_is_an_error(#{archives := Archives, c_src := CSrc} = Project) ->
    ok = file:write_file(filename:join(CSrc, "checksums.txt"), "# none\n"),
    wrong(Project, Archives, "has no erllama_cache_nif-"),
    ?assertEqual({error, enoent}, installed(Project)).

an_archive_without_the_library_is_an_error(#{archives := Archives} = Project) ->
    ok = archive(Project, [{"kvc", <<"a program">>}]),
    wrong(Project, Archives, "has no erllama_cache_nif.so"),
    ?assertEqual({error, enoent}, installed(Project)).

wrong(Project, From, Says) ->
    {error, Output} = install(Project, From),
    ?assertNotEqual(nomatch, string:find(Output, Says)),
    %% Nothing else was tried.
    ?assertEqual(nomatch, string:find(Output, "cargo")).

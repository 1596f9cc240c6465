%% What a node shows of the log events without anybody having configured a logger: what `erl' prints.
-module(erllama_cache_log_tests).

-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [run_command/2, file_of/2]).

-export([play/1]).

default_handler_test_() ->
    {timeout, 120, fun every_event_from_warning_up_is_printed/0}.

%% `store_scanned' is an info, below what a node logs unless it is told otherwise.
every_event_from_warning_up_is_printed() ->
    Root = make_root(),
    try
        %% A file that a scan removes, and one of a later version, which it skips.
        ok = file:write_file(file_of(Root, <<1:256>>), <<"not a KVC file">>),
        ok = file:write_file(file_of(Root, <<2:256>>), later_version()),
        {Status, Printed} = run_command("erl", [
            "-noinput", "-pa", ebin(erllama_cache_store), "-pa", ebin(?MODULE),
            "-run", atom_to_list(?MODULE), "play", Root
        ]),
        ?assertEqual({0, []}, {Status, [
            Event
         || Event <- ["corrupt_file_removed", "file_skipped", "slow_save"],
            string:find(Printed, Event) =:= nomatch
        ]}),
        ?assertEqual(nomatch, string:find(Printed, "store_scanned"))
    after
        ok = file:del_dir_r(Root)
    end.

%% In a node of its own.
play([Root]) ->
    {ok, _} = erllama_cache_store:start_link(store, #{root => Root}),
    {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store, slow_save_ms => 1}),
    Payload = binary:copy(<<"0123456789abcdef">>, 8 bsl 20),
    {ok, _} = erllama_cache_writer:save(store, disk, erllama_cache_test_util:meta(), Payload),
    %% Returns when the events have been printed.
    ok = logger_std_h:filesync(default),
    init:stop().

later_version() ->
    <<"KVC", 99, 0:((72 - 4) * 8)>>.

%% Under coverage a module comes from no file.
ebin(Module) ->
    case code:which(Module) of
        cover_compiled -> filename:join(code:lib_dir(erllama_cache_nif), "ebin");
        Path -> filename:dirname(Path)
    end.

make_root() ->
    Name = lists:concat([?MODULE, "_", os:getpid(), "_", erlang:unique_integer([positive])]),
    Root = filename:join(os:getenv("TMPDIR", "/tmp"), Name),
    ok = file:make_dir(Root),
    Root.

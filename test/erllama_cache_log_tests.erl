%% What a node shows of the log events without anybody having configured a logger: what `erl'
%% prints.
-module(erllama_cache_log_tests).

-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [run_node/3, file_of/2]).

-export([play/1]).

default_handler_test_() ->
    {timeout, 120, fun every_event_from_warning_up_is_printed/0}.

%% `store_scanned' is an info, below what a node logs unless it is told otherwise.
every_event_from_warning_up_is_printed() ->
    Root = make_root(),
    try
        %% A file that a scan removes, and one of a later version, which it skips.
        Damaged = file_of(Root, <<1:256>>),
        ok = file:write_file(Damaged, <<"not a KVC file">>),
        ok = file:change_time(Damaged, {{2020, 1, 1}, {0, 0, 0}}),
        ok = file:write_file(file_of(Root, <<2:256>>), later_version()),
        {Status, Printed} = run_node("", {?MODULE, play}, [Root]),
        ?assertEqual({0, []}, {Status, [
            Event
         || Event <- ["corrupt_file_removed", "file_skipped", "slow_save", "root_changed"],
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
    ok = file:rename(Root, Root ++ ".moved"),
    ok = file:make_dir(Root),
    miss = erllama_cache_store:load(store, <<0:256>>),
    _ = sys:get_state(store),
    ok = file:del_dir_r(Root ++ ".moved"),
    %% Returns when the events have been printed.
    ok = logger_std_h:filesync(default),
    init:stop().

later_version() ->
    <<"KVC", 99, 0:((72 - 4) * 8)>>.

make_root() ->
    Name = lists:concat([?MODULE, "_", os:getpid(), "_", erlang:unique_integer([positive])]),
    Root = filename:join(os:getenv("TMPDIR", "/tmp"), Name),
    ok = file:make_dir(Root),
    Root.

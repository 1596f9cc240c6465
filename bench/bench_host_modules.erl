%% Makes this node a host of either kind, for the benchmark of its model: keys, counters and tier
%% server are the tests' fakes, compiled for that kind; the rest is in bench/host.
-module(bench_host_modules).

-export([with_host/3]).
-export_type([kind/0]).

-type kind() :: tokens | text.

-define(SOURCES, [
    "bench/host/erllama_fake.erl", "bench/host/erllama_cache_meta_srv.erl",
    "test/fakes/erllama_cache_counters.erl", "test/fakes/erllama_cache_key.erl",
    "test/fakes/erllama_cache_disk_srv.erl", "test/fakes/erllama_fake_kvc.erl"
]).

%% Runs `Fun' in a host whose tier server has this name, its files in a new directory.
-spec with_host(kind(), TierSrv :: atom(), fun((Root :: binary()) -> Result)) -> Result.
with_host(Kind, TierSrv, Fun) ->
    lists:foreach(fun(Source) -> load(Source, Kind) end, ?SOURCES),
    ok = erllama_cache_counters:reset(),
    Root = bench_turns:new_root("BENCH_DISK", "/tmp"),
    {ok, Tier} = erllama_cache_disk_srv:start(TierSrv, Root),
    {ok, Index} = plain_writer:start_link(Root),
    try
        Fun(Root)
    after
        [gen_server:stop(Server, normal, infinity) || Server <- [Index, Tier]],
        file:del_dir_r(Root)
    end.

load(Source, Kind) ->
    Defines = [{d, 'TEXT_KEYED'} || Kind =:= text],
    {ok, Module, Beam} = compile:file(Source, [binary | Defines]),
    %% What is left of the kind before the last one.
    _ = code:purge(Module),
    {module, Module} = code:load_binary(Module, Source, Beam).

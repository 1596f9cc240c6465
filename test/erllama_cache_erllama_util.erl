%% What the suites share that run the writer as erllama does, with fakes of erllama's modules
%% (erllama_fake): the fixture, as a hook of Common Test, metadata, saves and waiters in short, what
%% the host was asked, what a file holds, and the verdict of the independent readers on every file
%% that a case leaves.
%%
%% All cases run against each kind of host, in the groups `tokens' and `text'.
-module(erllama_cache_erllama_util).

-include("erllama_cache_erllama_util.hrl").
-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, groups/1]).
-export([init/2, pre_init_per_suite/3, pre_init_per_group/4, post_end_per_group/5]).
-export([pre_init_per_testcase/4, post_end_per_testcase/5]).
-export([load_fakes/1, load_fake/2, meta/0, meta/1, by_kind/2, key_of/2, encoded/1]).
-export([start_writer/1, restart_writer/1, wait_in_line/0, waiting/0]).
-export([save/0, save/1, save/2, saved_and_forgotten/1, untidy_actor/0]).
-export([fails_and_is_undone/4, assert_nothing_left/1, assert_only/2, nothing_open/1]).
-export([restart_tier_server/0, restart_tier_server/1, script_dir/1, script_busy/0]).
-export([script_failure/0, host_calls/0, calls/0, calls_after_the_key/0, calls_but_the_check/0]).
-export([is_about_the_key/1]).
-export([args/1, token/1]).
-export([stored_payload/2, stored_quant_byte/2, payload/1, tags/1, as_host/0, oracle/1, on_peer/2]).
-export([renew_every/1]).

-import(erllama_cache_test_util, [
    fresh_dir/2, files/1, open_files/1, file_of/2, eventually/1, actor/0, actor/1, tell/2,
    run_command/2, source/1, stop/1
]).

%%% The fixture

suite() ->
    [{timetrap, {seconds, 60}}, {ct_hooks, [?MODULE]}].

%% For a suite's all/0.
all() ->
    [{group, KeyedBy} || {KeyedBy, _, _} <- groups([])].

%% For its groups/0: these cases, or groups of them, for each kind of host.
groups(Tests) ->
    [{KeyedBy, [], Tests} || KeyedBy <- [tokens, text]].

init(_Id, _Options) ->
    {ok, none}.

pre_init_per_suite(_Suite, Config, State) ->
    %% Without it nobody would judge what is saved.
    case os:find_executable("python3") of
        false ->
            {{fail, "python3 is missing: tools/setup.sh installs it"}, State};
        _ ->
            {ok, _} = application:ensure_all_started(crypto),
            {Config, State}
    end.

pre_init_per_group(_Suite, KeyedBy, Config, State) when KeyedBy =:= tokens; KeyedBy =:= text ->
    {[{keyed_by, KeyedBy} | Config], State};
pre_init_per_group(_Suite, _Group, Config, State) ->
    {Config, State}.

%% Others find the kind that is compiled.
post_end_per_group(_Suite, _Group, _Config, Return, State) ->
    ok = load_fakes(tokens),
    {Return, State}.

pre_init_per_testcase(_Suite, Case, Config, State) ->
    Root = fresh_dir(Case, Config),
    ok = load_fakes(proplists:get_value(keyed_by, Config, tokens)),
    ok = erllama_fake:start(?TIER, Root),
    start_writer(?LIMIT),
    eventually(fun() -> ?WRITER:current() =:= 0 end),
    {[{root, Root} | Config], State}.

%% Whatever a test leaves in the root under a name that ends in .kvc is a file that the host takes.
%% A test that leaves another one there on purpose says so, and removes it.
post_end_per_testcase(_Suite, _Case, Config, Return, State) ->
    Root = ?config(root, Config),
    stop(?WRITER),
    Verdict = the_host_takes(lists:sort(filelib:wildcard(Root ++ "/**/*.kvc"))),
    ok = erllama_fake:stop(),
    unmount(Root),
    case Verdict of
        ok -> {Return, State};
        {fail, _} -> {Verdict, State}
    end.

start_writer(Config) ->
    {ok, Pid} = ?WRITER:start_link(Config),
    true = unlink(Pid),
    Pid.

restart_writer(Config) ->
    stop(?WRITER),
    start_writer(Config).

unmount(Dir) ->
    case file:read_file("/proc/mounts") of
        {ok, Mounts} ->
            case binary:match(Mounts, list_to_binary([" ", Dir, " "])) of
                nomatch -> ok;
                _ -> {0, _} = run_command("umount", [Dir]), ok
            end;
        {error, enoent} ->
            ok
    end.

%%% The kind of host

%% The fakes that differ from kind to kind; the last one tells of which they are.
-define(OF_A_KIND, [erllama_cache_key, erllama_cache_meta_srv, erllama_cache_counters,
                    erllama_fake_kvc]).

%% Makes this node's fakes those of a host of this kind. None of them may run.
load_fakes(KeyedBy) ->
    case erllama_fake:keyed_by() of
        KeyedBy -> ok;
        _ -> lists:foreach(fun(Module) -> load_fake(Module, KeyedBy) end, ?OF_A_KIND)
    end.

load_fake(Module, KeyedBy) ->
    Source = source(Module),
    Defines = [{d, 'TEXT_KEYED'} || KeyedBy =:= text],
    {ok, Module, Beam} = compile:file(Source, [binary, debug_info | Defines]),
    %% What is left of the time before the last change.
    _ = code:purge(Module),
    {module, Module} = code:load_binary(Module, Source, Beam),
    ok.

%% A build_meta map: with other tokens it has another key, of either kind.
meta() ->
    #{tokens := Tokens} = erllama_cache_test_util:meta(),
    meta(Tokens).

meta(Tokens) ->
    Text = iolist_to_binary(io_lib:format("~w", [Tokens])),
    (erllama_cache_test_util:meta(Tokens))#{prompt_text => Text}.

%% What is so in a token-keyed host, and what in a text-keyed one.
by_kind(OfTokens, OfText) ->
    case erllama_fake:keyed_by() of
        tokens -> OfTokens;
        text -> OfText
    end.

%% The key that a map has in this host, computed by nobody's code but this.
key_of(#{fingerprint := Fingerprint, ctx_params_hash := CtxParamsHash} = Meta, QuantByte) ->
    Content = by_kind(encoded(maps:get(tokens, Meta)), maps:get(prompt_text, Meta, <<>>)),
    crypto:hash(sha256, [Fingerprint, QuantByte, CtxParamsHash, Content]).

encoded(Tokens) ->
    <<<<Token:32/little>> || Token <- Tokens>>.

%%% Slots and saves, in short

%% A process that waits for a slot, behind those who wait already.
wait_in_line() ->
    Before = length(?WRITER:waiters()),
    Actor = actor(),
    Ref = tell(Actor, fun() -> ?WRITER:acquire(infinity) end),
    eventually(fun() -> length(?WRITER:waiters()) =:= Before + 1 end),
    {Actor, Ref}.

waiting() ->
    [Pid || #{pid := Pid} <- ?WRITER:waiters()].

save() ->
    save(meta()).

save(Meta) ->
    save(Meta, ?PAYLOAD).

save(Meta, Payload) ->
    ?WRITER:save(?TIER, disk, Meta, Payload).

%% A process that collects no garbage for so long that nothing is closed by chance.
untidy_actor() ->
    actor([{min_heap_size, 1000000}]).

%% A file that stands in the root, of which the host knows nothing.
saved_and_forgotten(Config) ->
    {ok, Key} = save(),
    ok = ?META_SRV:forget(Key),
    ok = erllama_fake:forget_calls(),
    {Key, file_of(?config(root, Config), Key)}.

fails_and_is_undone(Error, Root, Payload, Config) ->
    ok = erllama_fake:forget_calls(),
    ok = script_dir([{return, Root}]),
    ?assertEqual(Error, save(meta(), Payload)),
    ?assertEqual([reserve_save, dir, cancel_reservation], calls_but_the_check()),
    [[Key, Token]] = args(cancel_reservation),
    ?assertMatch([[Key, disk, _]], args(reserve_save)),
    ?assert(is_reference(Token)),
    ?assertEqual({0, []}, {?WRITER:current(), ?META_SRV:reserved()}),
    ok = nothing_open(?config(root, Config)),
    ?assertEqual(#{}, erllama_cache_counters:all()).

assert_nothing_left(Config) ->
    Root = ?config(root, Config),
    ?assertEqual([], files(Root)),
    ok = nothing_open(Root),
    ?assertEqual({[], []}, {?META_SRV:reserved(), ?META_SRV:stored()}),
    ?assertEqual(0, ?WRITER:current()).

%% Large files are closed by a thread of the library, which may not have come to that yet.
nothing_open(Root) ->
    eventually(fun() -> open_files(Root) =:= [] end).

assert_only(Path, Config) ->
    Root = ?config(root, Config),
    ?assertEqual([filename:basename(Path)], files(Root)),
    ok = nothing_open(Root),
    ?assertEqual([], ?META_SRV:reserved()),
    ?assertEqual(0, ?WRITER:current()).

%%% What the host was asked

%% The tier server ends, and another one starts under its name, with the same root or this one.
restart_tier_server() ->
    restart_tier_server(gen_server:call(?TIER, dir)).

restart_tier_server(Root) ->
    ok = gen_server:stop(?TIER),
    {ok, _} = ?DISK_SRV:start(?TIER, Root),
    ok.

%% Makes the next save ask for the root, whatever it has asked before, with these steps.
script_dir(Steps) ->
    ok = restart_tier_server(),
    erllama_fake:script(dir, Steps).

%% Makes the next one that asks for the root give up at once, not after 5 s.
script_busy() ->
    erllama_fake:script(dir, [
        {instead, fun([TierSrv]) -> gen_server:call(TierSrv, dir, 0) end}
    ]).

%% Makes the next save fail and cancel its reservation.
script_failure() ->
    script_dir([{return, "/nowhere/at/all"}]).

%% What a save that succeeds calls.
host_calls() ->
    [by_kind(make, make_text), quant_byte, reserve_save, dir, check_reservation,
     mark_published, announce_saved, incr].

calls() ->
    [Name || {Name, _Args, _Caller} <- erllama_fake:calls()].

calls_after_the_key() ->
    [Name || Name <- calls(), not is_about_the_key(Name)].

is_about_the_key(Name) ->
    lists:member(Name, [make, make_text, quant_byte]).

%% A small save, written and published at one go, checks its reservation before that.
calls_but_the_check() ->
    lists:delete(check_reservation, calls_after_the_key()).

args(Name) ->
    [Args || {Called, Args, _Caller} <- erllama_fake:calls(), Called =:= Name].

token(Name) ->
    [[_Key, Token | _]] = args(Name),
    Token.

%%% What a file holds

stored_payload(Config, Key) ->
    {ok, File} = file:read_file(file_of(?config(root, Config), Key)),
    payload(File).

payload(<<_:48/binary, Offset:64/little, Length:64/little, _/binary>> = File) ->
    <<_:Offset/binary, Payload:Length/binary>> = File,
    Payload.

stored_quant_byte(Config, Key) ->
    {ok, File} = file:read_file(file_of(?config(root, Config), Key)),
    #{16#03 := <<Byte>>} = tags(File),
    Byte.

tags(<<_:72/binary, PromptLen:32/little, _:PromptLen/binary, TlvLen:32/little, Tlv:TlvLen/binary,
       _/binary>>) ->
    maps:from_list([
        {Tag, Value} || <<Tag, Length:32/little, Value:Length/binary>> <= Tlv
    ]).

%% Two readers are asked, which share no code with each other or with the library.
the_host_takes([]) ->
    ok;
the_host_takes(Files) ->
    Refused = [
        {File, Reason} || File <- Files, {error, Reason} <- [erllama_fake_kvc:read(File)]
    ],
    case {Refused, oracle(["check", as_host() | Files])} of
        {[], {0, _}} -> ok;
        {_, {_, Output}} -> {fail, {not_for_the_host, Refused, Output}}
    end.

%% The oracle's option for this kind of host.
as_host() ->
    "--host=" ++ integer_to_list(erllama_fake_kvc:version()).

oracle(Args) ->
    Script = erllama_cache_test_util:in_project("proofs/oracle/kvc_oracle.py"),
    run_command("python3", [Script | Args]).

%%% Other nodes

%% Runs `Fun' on another node, started by this command, with a host of the same kind, and returns
%% what it returns.
on_peer([Command | Args], Fun) ->
    {ok, Peer, _} = peer:start_link(#{
        connection => standard_io,
        exec => {os:find_executable(Command), Args},
        args => ["-pa" | code:get_path()]
    }),
    try
        ok = peer:call(Peer, ?MODULE, load_fakes, [erllama_fake:keyed_by()], 20000),
        peer:call(Peer, erlang, apply, [Fun, []], 20000)
    after
        peer:stop(Peer)
    end.

%% From now on a save on this node asks after this many milliseconds whether its reservation still
%% stands, and not after 15 s.
renew_every(Ms) ->
    Module = erllama_cache_host,
    {ok, {Module, [{abstract_code, {_, Forms}}]}} =
        beam_lib:chunks(code:which(Module), [abstract_code]),
    Answer = fun(Anno) -> [{clause, Anno, [], [], [{integer, Anno, Ms}]}] end,
    {ok, Module, Beam} = compile:forms([
        case Form of
            {function, Anno, renew_every, 0, _} -> {function, Anno, renew_every, 0, Answer(Anno)};
            _ -> Form
        end
     || Form <- Forms
    ]),
    {module, Module} = code:load_binary(Module, "as for this test", Beam),
    Ms = Module:renew_every(),
    ok.

%% The sides of the benchmarks of saves and loads: this writer, the bare floor, the plain Erlang
%% way. Each makes one file and says what it is called. What a caller has at hand, the metadata, is
%% made before the clock runs.
-module(bench_sides).

-export([meta/1, fresh/0, side/4, once/1, remove/2, with_store/3]).
-export_type([name/0, side/0]).

-import(bench_turns, [file_name/1]).

-define(TOKENS, 2048).
-define(STORE, bench_store).

-type name() :: floor | this | plain.
-type side() :: {Prepare :: fun(() -> term()), Save :: fun((term()) -> Key :: binary())}.

-spec meta(pos_integer()) -> erllama_cache_meta:build_meta().
meta(N) ->
    #{
        save_reason => cold, quant_bits => 16, quant_type => f16, fingerprint => <<N:256>>,
        fingerprint_mode => safe, ctx_params_hash => <<2:256>>, context_size => 4096,
        tokens => lists:seq(1, ?TOKENS)
    }.

%% Never the same twice.
-spec fresh() -> pos_integer().
fresh() ->
    erlang:unique_integer([positive]).

%% As many bytes as the real one: nobody looks at what they are.
prefix() ->
    binary:copy(<<0>>, 72 + 8 + 5 * 5 + 70 + 5 + 4 * ?TOKENS + 38 + 24).

-spec side(name(), erllama_cache_host:tier(), Root :: binary(), Payload :: binary()) -> side().
side(floor, _Tier, Root, Payload) ->
    Prefix = prefix(),
    Syncs = bench_nif:name_syncs(Root),
    Save = fun(Key) ->
        true = bench_nif:floor_save(Root, file_name(Key), Prefix, Payload, Syncs),
        Key
    end,
    {fun() -> <<(fresh()):256>> end, Save};
side(plain, _Tier, _Root, Payload) ->
    Save = fun(Meta) -> {ok, Key} = plain_writer:save(Meta, Payload), Key end,
    {fun() -> meta(fresh()) end, Save};
side(this, Tier, _Root, Payload) ->
    {
        fun() -> meta(fresh()) end,
        fun(Meta) -> {ok, Key} = erllama_cache_writer:save(?STORE, Tier, Meta, Payload), Key end
    }.

-spec once(side()) -> Key :: binary().
once({Prepare, Save}) ->
    Save(Prepare()).

-spec remove(Root :: binary(), Key :: binary()) -> ok.
remove(Root, Key) ->
    _ = file:delete(filename:join(Root, file_name(Key))),
    ok = erllama_cache_store:delete(?STORE, Key).

%% Runs it beside this writer's store and the plain side's server.
-spec with_store(Root :: binary(), erllama_cache_host:tier(), fun(() -> Result)) -> Result.
with_store(Root, Tier, Fun) ->
    {ok, Store} = erllama_cache_store:start_link(?STORE, #{root => Root, tier => Tier}),
    {ok, Plain} = plain_writer:start_link(Root),
    try Fun() after [gen_server:stop(Server) || Server <- [Store, Plain]] end.

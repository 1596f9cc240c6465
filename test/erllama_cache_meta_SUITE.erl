%% The build_meta map of a save: what has to be in it, what its values may be, and the defaults for
%% what it leaves out.
-module(erllama_cache_meta_SUITE).

-include("erllama_cache_erllama_util.hrl").
-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-compile(export_all).

-import(erllama_cache_test_util, [files/1, file_of/2]).
-import(erllama_cache_erllama_util, [
    meta/0, meta/1, by_kind/2, key_of/2, save/0, save/1, assert_nothing_left/1,
    calls_after_the_key/0, tags/1
]).

%% The quant byte of meta/0.
-define(QUANT_BYTE, 7).

suite() ->
    erllama_cache_erllama_util:suite().

all() ->
    erllama_cache_erllama_util:all().

groups() ->
    erllama_cache_erllama_util:groups([
        missing_keys,
        invalid_values,
        extreme_values,
        unknown_quant_type,
        agent_prefix,
        prompt_text_left_out,
        long_prompt,
        defaults
    ]).

missing_keys(Config) ->
    [
        begin
            ?assertEqual({error, {missing_key, Key}}, save(maps:remove(Key, meta()))),
            ?assertEqual([], calls_after_the_key())
        end
     || Key <- maps:keys(erllama_cache_test_util:meta())
    ],
    ?assertEqual(0, ?WRITER:current()),
    assert_nothing_left(Config),
    ?assertMatch({ok, _}, save()).

invalid_values(Config) ->
    [
        begin
            ?assertEqual({{error, {invalid_meta, Key}}, Value},
                         {save((meta())#{Key => Value}), Value}),
            ?assertEqual([], calls_after_the_key())
        end
     || {Key, Values} <- invalid(), Value <- Values
    ],
    assert_nothing_left(Config),
    ?assertMatch({ok, _}, save()).

invalid() ->
    Hash = [<<0:248>>, <<0:264>>, <<0:255>>, <<0:257>>, <<>>, lists:duplicate(32, 0), undefined],
    Binary = ["text", <<1:7>>, 1],
    U64 = [-1, 1 bsl 64, 1.0, now, <<0:64>>],
    [
        {save_reason, [warm, <<"cold">>, "cold", 1]},
        {quant_bits, [-1, 256, 4.0, four, <<4>>]},
        {fingerprint, Hash},
        {fingerprint_mode, [unsafe, <<"safe">>, 0]},
        {quant_type, [<<"f16">>, "f16", 1]},
        {ctx_params_hash, Hash},
        {tokens, [<<1:32>>, [1 | 2], [1, a], [1.0], [<<1>>], [[1]], #{}, undefined]},
        {context_size, [-1, 1 bsl 32, 1.0, large]},
        {creation_time, U64},
        {last_used_time, U64},
        {hit_count, [-1, 1 bsl 32, 1.0, often]},
        {prompt_text, [undefined | Binary]},
        {hostname, Binary},
        {erllama_version, Binary},
        {save_reason_detail, Binary}
    ].

%% What just fits, and keys that nobody asked for.
extreme_values(_Config) ->
    [
        ?assertMatch({{ok, _}, _, _}, {save((meta([N]))#{Key => Value}), Key, Value})
     || {N, {Key, Value}} <- lists:zip(lists:seq(1, length(extreme())), extreme())
    ].

extreme() ->
    [
        {quant_bits, 0}, {quant_bits, 255},
        {context_size, 0}, {context_size, 16#ffffffff},
        {creation_time, 0}, {creation_time, 16#ffffffffffffffff},
        {last_used_time, 0}, {last_used_time, 16#ffffffffffffffff},
        {hit_count, 0}, {hit_count, 16#ffffffff},
        {prompt_text, <<0, 255, 128>>}, {prompt_text, binary:copy(<<"p">>, 3000000)},
        {save_reason_detail, binary:copy(<<"d">>, 70000)},
        {tokens, []}, {tokens, lists:seq(1, 300000)},
        {a_later_versions_key, {any, term}}
    ].

%% The host's parser takes no such file: saved, it would be deleted, and its key never load.
unknown_quant_type(Config) ->
    ok = erllama_fake:forget_calls(),
    Meta = (meta())#{quant_type := mxfp4},
    ?assertEqual({error, {unknown_quant_byte, 255}}, save(Meta)),
    ?assertEqual([], files(?config(root, Config))),
    ?assertNot(lists:keymember(reserve_save, 1, erllama_fake:calls())),
    ?assertEqual(#{}, erllama_cache_counters:all()),
    ?assertEqual(0, ?WRITER:current()).

%% The save reason that only a text-keyed host has, and counts in a slot of its own.
agent_prefix(Config) ->
    Meta = (meta())#{save_reason := agent_prefix},
    case by_kind(invalid, valid) of
        invalid ->
            ?assertEqual({error, {invalid_meta, save_reason}}, save(Meta)),
            ?assertEqual([], erllama_fake:calls()),
            assert_nothing_left(Config);
        valid ->
            {ok, Key} = save(Meta),
            ?assertMatch({ok, <<"KVC", 2, _QuantBits, 6, _/binary>>}, file_with(Key, Config)),
            ?assertEqual(#{22 => 1}, erllama_cache_counters:all())
    end.

%% It counts as empty, in the key too.
prompt_text_left_out(Config) ->
    Meta = maps:remove(prompt_text, meta()),
    {ok, Key} = save(Meta),
    ?assertEqual(key_of(Meta#{prompt_text => <<>>}, ?QUANT_BYTE), Key),
    {ok, <<_:72/binary, 0:32, _/binary>>} = file_with(Key, Config),
    Stored = {error, already_present},
    ?assertEqual(Stored, save(Meta#{prompt_text => <<>>})),
    %% What is not in the key makes no other.
    ?assertEqual(by_kind(Stored, ok), result(save(Meta#{prompt_text => <<"another">>}))),
    ?assertEqual(by_kind(ok, Stored), result(save(Meta#{tokens => [2]}))).

result({ok, _Key}) -> ok;
result({error, _} = Error) -> Error.

%% As long as the prompts of agents are, and longer.
long_prompt(Config) ->
    [
        begin
            Meta = (meta([Bytes]))#{prompt_text => crypto:strong_rand_bytes(Bytes)},
            {ok, Key} = save(Meta),
            ?assertEqual(key_of(Meta, ?QUANT_BYTE), Key),
            ?assertMatch({ok, <<_:72/binary, Bytes:32/little, _/binary>>}, file_with(Key, Config))
        end
     || Bytes <- [1, 65536, 1 bsl 20]
    ].

file_with(Key, Config) ->
    file:read_file(file_of(?config(root, Config), Key)).

defaults(Config) ->
    Earliest = erlang:system_time(second),
    {ok, Key} = save(),
    Latest = erlang:system_time(second),
    {ok, File} = file_with(Key, Config),
    Version = erllama_fake_kvc:version(),
    <<"KVC", Version, 4, 1, 0:16, 4:32/little, 0:32, 4096:32/little, 0:32, Created:64/little,
      Used:64/little, _/binary>> = File,
    ?assert(Created >= Earliest andalso Created =< Latest),
    ?assertEqual(Created, Used),
    Tags = tags(File),
    {ok, Hostname} = inet:gethostname(),
    ?assertEqual(unicode:characters_to_binary(Hostname), maps:get(16#05, Tags)),
    ?assertEqual(<<"unknown">>, maps:get(16#06, Tags)),
    ?assertNot(is_map_key(16#07, Tags)),
    %% Undefined is as good as left out.
    Undefined = #{hostname => undefined, erllama_version => undefined,
                  save_reason_detail => undefined},
    {ok, Same} = save(maps:merge(meta([1]), Undefined)),
    {ok, SameFile} = file_with(Same, Config),
    Texts = [16#05, 16#06, 16#07],
    ?assertEqual(maps:with(Texts, Tags), maps:with(Texts, tags(SameFile))),
    %% Inside the host its version is known.
    ok = application:load({application, erllama, [{vsn, "0.5.1"}]}),
    try
        {ok, Inside} = save(meta([2])),
        {ok, Later} = file_with(Inside, Config),
        ?assertEqual(<<"0.5.1">>, maps:get(16#06, tags(Later)))
    after
        application:unload(erllama)
    end.

%% What is saved is what is loaded, whatever it is; and what is not what was saved is not loaded.
-module(prop_kvc_tests).

%% Before eunit.hrl, which leaves alone what this has defined.
-include_lib("proper/include/proper.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [temporary_dir/1, file_of/2, flip/3, patch/3]).

-export([prop_round_trip/2, prop_damage/2]).

-define(STORE, prop_kvc_store).

%% Where two fields begin that are rewritten later, and where the fields of fixed size end.
-define(HIT_COUNT, 12).
-define(LAST_USED, 32).
-define(FIXED_LEN, 72).
%% The digest's record, which is the last before the payload: tag, length, mode, digest.
-define(DIGEST_RECORD, 38).

properties_test_() ->
    %% Both versions of the format.
    [
        {foreach, fun() -> setup(KeyedBy) end, fun teardown/1, [
            fun(Root) -> property("round trip", KeyedBy, 400, prop_round_trip(KeyedBy, Root)) end,
            fun(Root) -> property("damage", KeyedBy, 1500, prop_damage(KeyedBy, Root)) end
        ]}
     || KeyedBy <- [tokens, text]
    ].

property(Title, KeyedBy, Tests, Property) ->
    Options = [quiet, {numtests, Tests}, {to_file, user}],
    Check = fun() -> ?assert(proper:quickcheck(Property, Options)) end,
    {lists:concat([Title, ", keyed by ", KeyedBy]), {timeout, 300, Check}}.

setup(KeyedBy) ->
    Root = temporary_dir(?MODULE),
    {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store}),
    {ok, _} = erllama_cache_store:start_link(?STORE, #{root => Root, keyed_by => KeyedBy}),
    Root.

teardown(Root) ->
    ok = gen_server:stop(?STORE),
    ok = gen_server:stop(erllama_cache_writer),
    ok = file:del_dir_r(Root).

%% PropEr 1.2, which Debian has, calls erlang:get_stacktrace/0 when a property raises an exception,
%% and that is gone since OTP 24.
without_exception(Fun) ->
    try
        Fun()
    catch
        Class:Reason:Stack ->
            io:format(user, "~p:~p~n~p~n", [Class, Reason, Stack]),
            false
    end.

%%% Round trip

prop_round_trip(KeyedBy, Root) ->
    ?FORALL({Meta, Payload}, {build_meta(KeyedBy), payload()}, without_exception(fun() ->
        Before = erlang:system_time(second),
        Key = expected_key(KeyedBy, Meta),
        {ok, Key} = erllama_cache_writer:save(?STORE, disk, Meta, Payload),
        {ok, Info, Loaded} = erllama_cache_store:load(?STORE, Key),
        Size = filelib:file_size(file_of(Root, Key)),
        ok = erllama_cache_store:delete(?STORE, Key),
        ?WHENFAIL(
            io:format(user, "~p~ngave~n~p~n", [Meta, Info]),
            conjunction([
                {payload, Loaded =:= Payload},
                {info, Info =:= expected_info(KeyedBy, Meta, Info, Size)},
                {defaults, defaults_hold(Meta, Info, Before)},
                {size, Size =:= expected_size(Info, Payload)}
            ])
        )
    end)).

%% Independent of the code that is tested.
expected_key(KeyedBy, Meta) ->
    #{fingerprint := Fp, quant_type := Quant, ctx_params_hash := Ctx, tokens := Tokens} = Meta,
    Content = case KeyedBy of
        tokens -> [<<T:32/little>> || T <- Tokens];
        text -> maps:get(prompt_text, Meta, <<>>)
    end,
    crypto:hash(sha256, [Fp, quant_byte(Quant), Ctx, Content]).

version(tokens) -> 1;
version(text) -> 2.

quant_byte(f32) -> 0;
quant_byte(q4_k_m) -> 7;
quant_byte(bf16) -> 29.

%% The map that was saved, with what a load adds or says otherwise. What was left out is taken from
%% the load: see defaults_hold/3.
expected_info(KeyedBy, #{tokens := Tokens, quant_type := Quant} = Meta, Info, Size) ->
    QuantByte = quant_byte(Quant),
    Known = QuantByte =/= 255,
    maps:merge(maps:with(optional(), Info), Meta#{
        version => version(KeyedBy),
        tokens := << <<Token:32/little>> || Token <- Tokens >>,
        quant_byte => QuantByte,
        quant_type := case Known of true -> Quant; false -> undefined end,
        file_size => Size
    }).

defaults_hold(Meta, Info, Before) ->
    {ok, Hostname} = inet:gethostname(),
    Now = erlang:system_time(second),
    lists:all(
        fun(Key) ->
            Value = maps:get(Key, Info),
            case Key of
                _ when is_map_key(Key, Meta) -> true;
                creation_time -> Value >= Before andalso Value =< Now;
                last_used_time -> Value >= Before andalso Value =< Now;
                hit_count -> Value =:= 0;
                hostname -> Value =:= unicode:characters_to_binary(Hostname);
                erllama_version -> Value =:= <<"unknown">>;
                _Text -> Value =:= <<>>
            end
        end,
        optional()
    ).

%% The whole file, by the format's description.
expected_size(Info, Payload) ->
    %% The digest's is the last record, and always there.
    Tags = [32, 1, 1, 32, 4, byte_size(maps:get(tokens, Info)), 33] ++ [
        byte_size(Text)
     || Key <- [hostname, erllama_version, save_reason_detail],
        Text <- [maps:get(Key, Info)],
        Text =/= <<>>
    ],
    ?FIXED_LEN + 4 + byte_size(maps:get(prompt_text, Info)) + 4 +
        lists:sum([1 + 4 + Length || Length <- Tags]) + byte_size(Payload).

%%% Damage

prop_damage(KeyedBy, Root) ->
    Input = {build_meta(KeyedBy), small_payload(), damage()},
    ?FORALL({Meta, Payload, Damage}, Input, without_exception(fun() ->
        {ok, Key} = erllama_cache_writer:save(?STORE, disk, Meta, Payload),
        Path = file_of(Root, Key),
        {ok, Good} = file:read_file(Path),
        Bad = damaged(Damage, Good),
        ok = file:write_file(Path, Bad),
        Result = erllama_cache_store:load(?STORE, Key),
        ok = erllama_cache_store:delete(?STORE, Key),
        ?WHENFAIL(
            io:format(user, "~p ~p gave~n~p~n", [Meta, Damage, Result]),
            holds(Result, Good, Bad, Payload)
        )
    end)).

%% A file that is as it was is loaded. Of another one nothing but what no checksum covers may differ
%% when it is loaded: neither its length, nor its payload, nor what makes its key. With its digest
%% it is none but the one that was saved.
holds({ok, #{file_size := Size, version := Version} = Info, Loaded}, Good, Bad, Payload) ->
    Covered = covered(Version, digest_record(Good, Payload) =:= digest_record(Bad, Payload)),
    Loaded =:= Payload andalso Size =:= byte_size(Good) andalso byte_size(Bad) =:= Size andalso
        maps:with(Covered, described(Info)) =:= maps:with(Covered, described(Good));
holds({error, {corrupt, Reason}}, Good, Bad, _Payload) when is_atom(Reason) ->
    Good =/= Bad andalso differ_where_it_matters(Good, Bad);
holds(_Other, _Good, _Bad, _Payload) ->
    false.

%% Of a file that has lost its digest, the key covers tokens or text alone.
covered(_Version, true) -> [fingerprint, quant_byte, ctx_params_hash, tokens, prompt_text];
covered(1, false) -> [fingerprint, quant_byte, ctx_params_hash, tokens];
covered(2, false) -> [fingerprint, quant_byte, ctx_params_hash, prompt_text].

digest_record(File, Payload) ->
    binary:part(File, byte_size(File) - byte_size(Payload) - ?DIGEST_RECORD, ?DIGEST_RECORD).

%% What the key of either version is made of, as the load tells it.
described(#{fingerprint := _} = Info) ->
    Info;
%% The same from the undamaged file, whose TLV section begins behind the prompt: fingerprint, mode,
%% quant byte, context hash, number of tokens, tokens.
described(Good) ->
    <<_:?FIXED_LEN/binary, PromptLen:32/little, Prompt:PromptLen/binary, _TlvLen:32,
      1, 32:32/little, Fp:32/binary, 2, 1:32/little, _Mode, 3, 1:32/little, Quant,
      4, 32:32/little, Ctx:32/binary, 8, 4:32/little, Count:32/little,
      9, TokensLen:32/little, Tokens:TokensLen/binary, _/binary>> = Good,
    TokensLen = 4 * Count,
    #{fingerprint => Fp, quant_byte => Quant, ctx_params_hash => Ctx, tokens => Tokens,
      prompt_text => Prompt}.

%% Hits and last use are rewritten while a file lives: whatever they are, it is no damage.
differ_where_it_matters(Good, Bad) ->
    without_uses(Good) =/= without_uses(Bad).

without_uses(<<Head:?HIT_COUNT/binary, _Hits:4/binary, Middle:(?LAST_USED - ?HIT_COUNT - 4)/binary,
               _Used:8/binary, Rest/binary>>) ->
    {Head, Middle, Rest};
without_uses(Short) ->
    Short.

damage() ->
    oneof([
        none,
        {truncate, fraction()},
        {append, ?SUCHTHAT(Bytes, binary(), Bytes =/= <<>>)},
        {flip, fraction(), range(0, 7)},
        %% The header and the tags, which a fraction of a larger file seldom hits.
        {flip_early, range(0, 255), range(0, 7)},
        {length, oneof([8, 12, 32, 40, 48, 56, prompt, tlv, value]), huge()},
        {both_lengths, huge()},
        {zero, fraction(), range(1, 64)},
        other_version
    ]).

%% A place in a file, in thousandths of its length.
fraction() ->
    range(0, 999).

huge() ->
    oneof([<<-1:64>>, <<0, 0, 0, 0, 0, 0, 0, 128>>, <<255, 255, 255, 127, 0, 0, 0, 0>>,
           <<0, 0, 0, 0, 0, 1, 0, 0>>, <<0:64>>, binary(8)]).

damaged(none, Good) ->
    Good;
damaged(other_version, <<"KVC", Version, Rest/binary>>) ->
    <<"KVC", (3 - Version), Rest/binary>>;
damaged({truncate, Fraction}, Good) ->
    binary:part(Good, 0, at(Fraction, Good));
damaged({append, Bytes}, Good) ->
    <<Good/binary, Bytes/binary>>;
damaged({flip, Fraction, Bit}, Good) ->
    flip(Good, at(Fraction, Good), Bit);
damaged({flip_early, Offset, Bit}, Good) ->
    flip(Good, Offset rem byte_size(Good), Bit);
damaged({length, Offset, Huge}, Good) when is_integer(Offset) ->
    patch(Good, Offset, Huge);
damaged({length, prompt, <<Huge:4/binary, _/binary>>}, Good) ->
    patch(Good, ?FIXED_LEN, Huge);
damaged({length, Where, <<Huge:4/binary, _/binary>>}, Good) ->
    <<_:?FIXED_LEN/binary, PromptLen:32/little, _/binary>> = Good,
    Tlv = ?FIXED_LEN + 4 + PromptLen,
    %% The section's length, or that of its first value.
    patch(Good, case Where of tlv -> Tlv; value -> Tlv + 5 end, Huge);
damaged({both_lengths, Huge}, Good) ->
    patch(patch(Good, 56, Huge), 40, Huge);
damaged({zero, Fraction, Length}, Good) ->
    At = at(Fraction, Good),
    patch(Good, At, <<0:(min(Length, byte_size(Good) - At) * 8)>>).

at(Fraction, Good) ->
    byte_size(Good) * Fraction div 1000.

%%% Generators

optional() ->
    [creation_time, last_used_time, hit_count, prompt_text, hostname, erllama_version,
     save_reason_detail].

%% Lists of pairs, because PropEr 1.2 looks for generators in tuples and lists, not in maps.
build_meta(KeyedBy) ->
    ?LET({Required, Optional, Chosen}, {required(KeyedBy), every_optional(), sublist(optional())},
         maps:merge(maps:from_list(Required), maps:with(Chosen, maps:from_list(Optional)))).

required(KeyedBy) ->
    Reasons = [unknown, cold, continued, evict, shutdown, finish] ++
        [agent_prefix || KeyedBy =:= text],
    [
        {save_reason, oneof(Reasons)},
        {quant_bits, byte()},
        {fingerprint, binary(32)},
        {fingerprint_mode, oneof([safe, gguf_chunked, fast_unsafe])},
        {quant_type, oneof([f32, q4_k_m, bf16])},
        {ctx_params_hash, binary(32)},
        {tokens, list(token())},
        {context_size, u32()}
    ].

every_optional() ->
    [
        {creation_time, u64()},
        {last_used_time, u64()},
        {hit_count, u32()},
        {prompt_text, text()},
        {hostname, text()},
        {erllama_version, text()},
        {save_reason_detail, text()}
    ].

%% Stored modulo 2^32, however big.
token() ->
    frequency([{8, range(0, 150_000)}, {1, u32()}, {1, integer()}, {1, largeint()},
               {1, ?LET({Big, Small}, {largeint(), integer()}, Big bsl 64 + Small)}]).

u32() ->
    oneof([0, 16#ffffffff, range(0, 16#ffffffff)]).

u64() ->
    oneof([0, 16#ffffffffffffffff, range(0, 16#ffffffffffffffff)]).

%% UTF-8 by convention, bytes by right.
text() ->
    oneof([<<>>, utf8(), binary()]).

sublist(List) ->
    ?LET(Picks, vector(length(List), boolean()),
         [Element || {Element, true} <- lists:zip(List, Picks)]).

%% Now and then one that is written in pieces.
payload() ->
    frequency([{1, <<>>}, {10, binary()}, {4, sized_payload(1 bsl 17)},
               {1, sized_payload(3 bsl 20)}]).

small_payload() ->
    frequency([{1, <<>>}, {6, binary()}, {3, sized_payload(1 bsl 13)}]).

%% PropEr makes and shrinks a seed, not megabytes.
sized_payload(Max) ->
    ?LET({Length, Seed}, {range(0, Max), range(0, 1 bsl 32)}, begin
        {Bytes, _} = rand:bytes_s(Length, rand:seed_s(exsss, Seed)),
        Bytes
    end).

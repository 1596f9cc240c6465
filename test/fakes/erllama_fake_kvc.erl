%% What the host makes of a file: its parser, as strict as the host's, which takes files of one
%% version only. It shares no code with the library, and is slow.
-module(erllama_fake_kvc).

-export([keyed_by/0, version/0, read/1, look/1, parse/1]).
-export_type([info/0, reason/0]).

-type info() :: #{
    key := <<_:256>>,
    size := pos_integer(),
    header := <<_:384>>,
    tokens := binary(),
    prompt_text := binary(),
    tags := #{byte() => binary()}
}.
-type reason() :: atom() | {atom(), term()}.

%% Which kind of host this is: see erllama_fake.
-ifdef(TEXT_KEYED).
-define(KEYED_BY, text).
-define(VERSION, 2).
-define(LAST_REASON, 6).
-else.
-define(KEYED_BY, tokens).
-define(VERSION, 1).
-define(LAST_REASON, 5).
-endif.

-define(HEADER, 48).
-define(LAST_MODE, 2).

-spec keyed_by() -> tokens | text.
keyed_by() -> ?KEYED_BY.

-spec version() -> 1 | 2.
version() -> ?VERSION.

%% A file under its name: a key's file holds that key.
-spec read(file:name_all()) -> {ok, info(), Payload :: binary()} | {error, reason()}.
read(Path) ->
    read(Path, fun is_whole/2).

%% The same, all but the sum of its payload, which takes a second for some ten MiB.
-spec look(file:name_all()) -> {ok, info(), Payload :: binary()} | {error, reason()}.
look(Path) ->
    read(Path, fun(_Payload, _Crc) -> true end).

read(Path, IsWhole) ->
    case file:read_file(Path) of
        {ok, File} ->
            case parse(File, IsWhole) of
                {ok, #{key := Key}, _} = Parsed -> under_its_name(Path, Key, Parsed);
                {error, _} = Error -> Error
            end;
        {error, _} = Error ->
            Error
    end.

under_its_name(Path, Key, Parsed) ->
    Name = binary_to_list(string:lowercase(binary:encode_hex(Key))) ++ ".kvc",
    case lists:member(filename:basename(Path), [Name, list_to_binary(Name)]) of
        true -> Parsed;
        false -> {error, name_is_not_the_key}
    end.

-spec parse(binary()) -> {ok, info(), Payload :: binary()} | {error, reason()}.
parse(File) ->
    parse(File, fun is_whole/2).

parse(File, IsWhole) ->
    try
        parsed(File, IsWhole)
    catch
        throw:Reason -> {error, Reason}
    end.

parsed(<<"KVC", Version, _/binary>>, _IsWhole) when Version =/= ?VERSION ->
    throw({unknown_version, Version});
parsed(<<"KVC", ?VERSION, _QuantBits, Reason, 0:16, Count:32/little, _Hits:32, _Context:32, 0:32,
         _Created:64, _Used:64, Bytes:64/little, Offset:64/little, Length:64/little,
         Crc:32/little, 0:32, PromptLength:32/little, Prompt:PromptLength/binary,
         TlvLength:32/little, Tlv:TlvLength/binary, Payload/binary>> = File, IsWhole) ->
    Reason =< ?LAST_REASON orelse throw({unknown_save_reason, Reason}),
    Offset =:= byte_size(File) - byte_size(Payload) orelse throw(payload_offset),
    Bytes =:= Length orelse throw(payload_bytes),
    %% Neither cut short nor followed by anything.
    Length =:= byte_size(Payload) orelse throw(payload_length),
    Tags = tags(Tlv, #{}),
    Tokens = tag(16#09, Tags),
    byte_size(Tokens) =:= 4 * Count orelse throw(token_count),
    tag(16#08, Tags) =:= <<Count:32/little>> orelse throw(token_count),
    IsWhole(Payload, Crc) orelse throw(crc),
    Info = #{
        key => key(Tags, content(Tokens, Prompt)), size => byte_size(File),
        header => binary:part(File, 0, ?HEADER), tokens => Tokens, prompt_text => Prompt,
        tags => Tags
    },
    {ok, Info, Payload};
parsed(<<"KVC", _/binary>>, _IsWhole) ->
    throw(malformed);
parsed(_File, _IsWhole) ->
    throw(no_magic).

%% What the key is made of, beside what all keys are.
-ifdef(TEXT_KEYED).
content(_Tokens, Prompt) -> Prompt.
-else.
content(Tokens, _Prompt) -> Tokens.
-endif.

key(Tags, Content) ->
    Fingerprint = sized(16#01, 32, Tags),
    <<Mode>> = sized(16#02, 1, Tags),
    Mode =< ?LAST_MODE orelse throw({unknown_fingerprint_mode, Mode}),
    <<QuantByte>> = sized(16#03, 1, Tags),
    erllama_cache_key:names(QuantByte) orelse throw({unknown_quant_byte, QuantByte}),
    CtxParamsHash = sized(16#04, 32, Tags),
    crypto:hash(sha256, [Fingerprint, QuantByte, CtxParamsHash, Content]).

%% Tags that nobody knows are skipped, but none may come twice.
tags(<<>>, Tags) ->
    Tags;
tags(<<Tag, Length:32/little, Value:Length/binary, Rest/binary>>, Tags) ->
    is_map_key(Tag, Tags) andalso throw({repeated_tag, Tag}),
    tags(Rest, Tags#{Tag => Value});
tags(_, _Tags) ->
    throw(malformed_tags).

tag(Tag, Tags) ->
    case Tags of
        #{Tag := Value} -> Value;
        _ -> throw({missing_tag, Tag})
    end.

sized(Tag, Size, Tags) ->
    case tag(Tag, Tags) of
        Value when byte_size(Value) =:= Size -> Value;
        _ -> throw({tag_size, Tag})
    end.

%%% CRC-32C by its table, a byte at a time

is_whole(Payload, Crc) ->
    Crc =:= crc32c(Payload).

crc32c(Binary) ->
    crc32c(Binary, table(), 16#ffffffff) bxor 16#ffffffff.

crc32c(<<Byte, Rest/binary>>, Table, Crc) ->
    Next = element(((Crc bxor Byte) band 16#ff) + 1, Table) bxor (Crc bsr 8),
    crc32c(Rest, Table, Next);
crc32c(<<>>, _Table, Crc) ->
    Crc.

table() ->
    list_to_tuple([entry(Byte, 8) || Byte <- lists:seq(0, 255)]).

entry(Crc, 0) -> Crc;
entry(Crc, Bits) when Crc band 1 =:= 1 -> entry((Crc bsr 1) bxor 16#82f63b78, Bits - 1);
entry(Crc, Bits) -> entry(Crc bsr 1, Bits - 1).

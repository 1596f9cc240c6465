%% A save as it is usually written in Erlang, to measure against: a slot from plain_semaphore, key
%% and header made in Erlang, a server asked for the reservation at each step, a checksum by a table
%% over the payload, the file written through `prim_file', synced, linked under its name, the
%% directory synced, the whole file read back into the VM, parsed and checksummed again.
-module(plain_writer).
-behaviour(gen_server).

-export([start_link/1, save/2, save/3, announced/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-spec start_link(Root :: binary()) -> {ok, pid()}.
start_link(Root) ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, Root, []).

-spec save(map(), binary()) -> {ok, binary()}.
save(Meta, Payload) ->
    {ok, _} = save(Meta, Payload, infinity).

%% With so long to wait for a slot.
-spec save(map(), binary(), timeout()) -> {ok, binary()} | {error, max_concurrent}.
save(Meta, Payload, Timeout) ->
    case plain_semaphore:acquire(Timeout) of
        ok ->
            try
                {ok, save_in_slot(Meta, Payload)}
            after
                plain_semaphore:release()
            end;
        {error, max_concurrent} = Error ->
            Error
    end.

%% The keys of what has been saved.
-spec announced() -> [binary()].
announced() ->
    gen_server:call(?MODULE, announced).

save_in_slot(#{fingerprint := Fingerprint, ctx_params_hash := Context} = Meta, Payload) ->
    Encoded = <<<<Token:32/little>> || Token <- maps:get(tokens, Meta)>>,
    Text = maps:get(prompt_text, Meta, <<>>),
    Key = crypto:hash(sha256, [Fingerprint, 1, Context, content(Encoded, Text)]),
    {ok, Token} = gen_server:call(?MODULE, {reserve, Key, self()}),
    Root = gen_server:call(?MODULE, root),
    Crc = bench_nif:table_crc32c(Payload),
    Prefix = prefix(Meta, Encoded, Text, Payload, Crc),
    Name = <<(string:lowercase(binary:encode_hex(Key)))/binary, ".kvc">>,
    Tmp = filename:join(Root, <<Name/binary, ".tmp">>),
    Final = filename:join(Root, Name),
    ok = write(Tmp, [Prefix, Payload]),
    ok = gen_server:call(?MODULE, {check, Key, Token}),
    ok = prim_file:make_link(Tmp, Final),
    ok = prim_file:delete(Tmp),
    ok = sync_directory(Root),
    ok = validate(Final, Meta, Encoded),
    ok = gen_server:call(?MODULE, {mark, Key, Token, Final}),
    ok = gen_server:call(?MODULE, {announce, Key, Token, byte_size(Payload), Encoded}),
    Key.

%% What the key is made of, beside what all keys are: only a host whose keys are made of text gives
%% the text.
content(Encoded, <<>>) -> Encoded;
content(_Encoded, Text) -> Text.

prefix(Meta, Tokens, Text, Payload, Crc) ->
    #{fingerprint := Fingerprint, ctx_params_hash := Context, context_size := Size} = Meta,
    %% The default of a field that is not given.
    {ok, Host} = inet:gethostname(),
    Records = [
        record(1, Fingerprint), record(2, <<0>>), record(3, <<1>>), record(4, Context),
        record(8, <<(byte_size(Tokens) div 4):32/little>>), record(9, Tokens),
        record(5, list_to_binary(Host)), record(6, <<"unknown">>)
    ],
    Tlv = iolist_to_binary(Records),
    Now = erlang:system_time(second),
    Bytes = byte_size(Payload),
    <<
        "KVC", 1, 16, 1, 0:16, (byte_size(Tokens) div 4):32/little, 0:32, Size:32/little, 0:32,
        Now:64/little, Now:64/little, Bytes:64/little,
        (80 + byte_size(Text) + byte_size(Tlv)):64/little, Bytes:64/little, Crc:32/little, 0:32,
        (byte_size(Text)):32/little, Text/binary, (byte_size(Tlv)):32/little, Tlv/binary
    >>.

record(Tag, Value) ->
    [Tag, <<(byte_size(Value)):32/little>>, Value].

write(Tmp, Data) ->
    {ok, File} = prim_file:open(Tmp, [write, exclusive, raw, binary]),
    ok = prim_file:write(File, Data),
    ok = prim_file:datasync(File),
    prim_file:close(File).

sync_directory(Root) ->
    {ok, Directory} = prim_file:open(Root, [read, directory, raw]),
    ok = prim_file:sync(Directory),
    prim_file:close(Directory).

%% That it is a file, a whole one, and of this key.
validate(Final, #{fingerprint := Fingerprint, ctx_params_hash := Context}, Encoded) ->
    {ok, <<"KVC", 1, _:36/binary, Bytes:64/little, Offset:64/little, Bytes:64/little, Crc:32/little,
           0:32, TextLength:32/little, _Text:TextLength/binary, Length:32/little,
           Tlv:Length/binary, Payload/binary>>} = prim_file:read_file(Final),
    {Offset, Bytes} = {80 + TextLength + Length, byte_size(Payload)},
    #{1 := Fingerprint, 4 := Context, 9 := Encoded} = records(Tlv, #{}),
    Crc = bench_nif:table_crc32c(Payload),
    ok.

records(<<>>, Records) ->
    Records;
records(<<Tag, Length:32/little, Value:Length/binary, Rest/binary>>, Records) ->
    records(Rest, Records#{Tag => Value}).

%%% The index: reservations with a monitor each, then rows.

init(Root) ->
    ?MODULE = ets:new(?MODULE, [named_table]),
    {ok, Root}.

handle_call(root, _From, Root) ->
    {reply, Root, Root};
handle_call({reserve, Key, Pid}, _From, Root) ->
    Token = monitor(process, Pid),
    true = ets:insert_new(?MODULE, {Key, Token, writing}),
    {reply, {ok, Token}, Root};
handle_call({check, Key, Token}, _From, Root) ->
    [{Key, Token, writing}] = ets:lookup(?MODULE, Key),
    {reply, ok, Root};
handle_call({mark, Key, Token, Path}, _From, Root) ->
    true = ets:insert(?MODULE, {Key, Token, {published, Path}}),
    {reply, ok, Root};
handle_call({announce, Key, Token, Size, Tokens}, _From, Root) ->
    true = demonitor(Token, [flush]),
    true = ets:insert(?MODULE, {Key, Size, Tokens}),
    {reply, ok, Root};
handle_call({cancel, Key, Token}, _From, Root) ->
    true = demonitor(Token, [flush]),
    true = ets:delete(?MODULE, Key),
    {reply, ok, Root};
handle_call(announced, _From, Root) ->
    Keys = ets:select(?MODULE, [{{'$1', '$2', '_'}, [{is_integer, '$2'}], ['$1']}]),
    {reply, Keys, Root}.

handle_cast(_Request, Root) ->
    {noreply, Root}.

handle_info(_Message, Root) ->
    {noreply, Root}.
